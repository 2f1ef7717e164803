"""Parts of `headline.py`: settings, data, rewards, methods, cells, results."""
