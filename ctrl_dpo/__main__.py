"""``python -m ctrl_dpo``: the command line, for launchers that start modules."""

from ctrl_dpo.cli import main

if __name__ == "__main__":
    main()
