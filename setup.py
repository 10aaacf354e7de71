"""The README for an index page, where its links and pictures need whole addresses; all else is in `pyproject.toml`."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "persample/persample"

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[([^]]*)\]\((?!https?:)", rf"![\1](https://raw.githubusercontent.com/{REPOSITORY}/main/", readme)
readme = re.sub(r"(?<!!)\[([^]]*)\]\((?!https?:|#)", rf"[\1](https://github.com/{REPOSITORY}/blob/main/", readme)
setup(long_description=readme, long_description_content_type="text/markdown")
