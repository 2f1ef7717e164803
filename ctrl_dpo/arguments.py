"""Settings of a training run: one YAML file, any key overridden as ``--key value``."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import HfArgumentParser
from transformers.trainer_pt_utils import AcceleratorConfig

from ctrl_dpo.config import CTRLDPOConfig
from ctrl_dpo.data.disk import exclusive
from ctrl_dpo.data.folders import StageFolder, content_hash
from ctrl_dpo.data.hashes import model_hash
from ctrl_dpo.engine.processes import on_main

if TYPE_CHECKING:
    from peft import LoraConfig

# larger than any configuration, smaller than an alias bomb
_MAX_BYTES = 1 << 20


@dataclass
class AdapterArguments:
    """The LoRA adapter that is trained."""

    lora_r: int = field(
        default=16, metadata={"help": "Rank of the adapter; 0 trains all weights instead."}
    )
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, over its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Layers that get an adapter: names, or all-linear (all but the head)."},
    )

    def peft_config(self) -> LoraConfig | None:
        """Build PEFT's configuration; None when all weights are trained."""
        if self.lora_r == 0:
            return None
        from peft import LoraConfig

        targets = self.lora_target_modules
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        )


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases (which can grow without bound) and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"config must not use YAML aliases; got one{self._place()}.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = next((n for n in names if names.count(n) > 1), None)
        if repeated is not None:
            raise ValueError(f"config must name each key once; got {repeated!r} twice.")
        return super().construct_mapping(node, deep)

    def _place(self) -> str:
        return f" at line {self.line + 1}"


def parse_arguments(
    config: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[AdapterArguments, CTRLDPOConfig]:
    """Read the settings of a run.

    Parameters
    ----------
    config : str or Path, optional
        YAML file whose keys are fields of :class:`AdapterArguments` or
        :class:`ctrl_dpo.CTRLDPOConfig` (so also of ``transformers.TrainingArguments``).
    overrides : sequence of str
        Command-line words ``--key value`` or ``--key=value``, stronger than the file.

    Returns
    -------
    (AdapterArguments, CTRLDPOConfig)
        Checked settings.

    Notes
    -----
    An unknown or repeated key, a file that is no flat mapping, and a value that the configuration
    refuses are errors that name the key.
    """
    known = [f.name for cls in (AdapterArguments, CTRLDPOConfig) for f in _fields(cls)]
    words = [*_words(_read(config)), *overrides] if config is not None else list(overrides)
    _check_keys((w[2:].partition("=")[0] for w in words if w.startswith("--")), known)
    parser = HfArgumentParser((AdapterArguments, CTRLDPOConfig), prog="ctrl-dpo train")
    adapter, training = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    return adapter, training


def changed_words(settings: Mapping[str, Any]) -> list[str]:
    """Return the words that :func:`parse_arguments` reads these settings from.

    Parameters
    ----------
    settings : mapping
        Values by key, as ``stage.json`` holds them.

    Returns
    -------
    list of str
        ``--key value`` of every setting that is not at the default of its field; a default that
        depends on the device is given.
    """
    fields = [f for cls in (AdapterArguments, CTRLDPOConfig) for f in _fields(cls)]
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in fields
    }
    # what None stands for, less what transformers keeps out of the settings too
    accelerator = AcceleratorConfig().to_dict().items()
    defaults["accelerator_config"] = {k: v for k, v in accelerator if k != "use_configured_state"}
    return list(_words({k: v for k, v in settings.items() if v != defaults[k]}))


@contextmanager
def open_run(
    adapter: AdapterArguments, args: CTRLDPOConfig, model: str, data: str
) -> Iterator[StageFolder]:
    """Hold the output folder of a run, new or begun by the same settings, model and data.

    Parameters
    ----------
    adapter : AdapterArguments
        From :func:`parse_arguments`.
    args : CTRLDPOConfig
        Its ``allow_changed`` also continues what other settings began.
    model, data : str
        Folder, file or hub name.

    Yields
    ------
    StageFolder
        Locked: no other run trains into it. Several processes of one run share it.
    """
    free = {"output_dir", "run_name", "reference_cache", "allow_changed", "resume_from_checkpoint"}
    settings = {k: v for k, v in args.to_dict().items() if k not in free} | vars(adapter)
    inputs = {"model": model_hash(model), "data": content_hash(data)}
    folder = StageFolder(Path(args.output_dir), "train", settings, inputs, n_shards=0)
    with ExitStack() as held:
        on_main(lambda: held.enter_context(exclusive(args.output_dir)))
        on_main(lambda: folder.open(allow_changed=args.allow_changed))
        yield folder


def _fields(cls: type) -> Iterable[dataclasses.Field[Any]]:
    return (f for f in dataclasses.fields(cls) if f.init)


def _read(config: str | Path) -> Mapping[str, Any]:
    """Load the YAML file as a flat mapping."""
    path = Path(config)
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"config must be under {_MAX_BYTES} bytes; got {path.stat().st_size}.")
    try:
        loaded = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"config must be YAML; got {str(path)!r}: {error}") from None
    if not isinstance(loaded, dict):
        raise TypeError(f"config must be a mapping of keys to values; got {loaded!r} in {path}.")
    return loaded


def _words(settings: Mapping[str, Any]) -> Iterable[str]:
    """Turn settings into the words that a command line would hold."""
    for key, value in settings.items():
        if value is None:
            continue
        yield f"--{key}"
        if isinstance(value, list):
            yield from map(str, value)
        else:
            yield json.dumps(value) if isinstance(value, dict) else str(value)


def _check_keys(keys: Iterable[str], known: Sequence[str]) -> None:
    """Raise for the first key that is no setting, naming the nearest one."""
    for key in keys:
        if key.replace("-", "_") not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config key must be a known setting; got {key!r}.{hint}")
