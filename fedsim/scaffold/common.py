"""The files that every package of `fedsim new` has; `<name>`, `<class>`, `<package>` … are filled in."""

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "<project>"
version = "0.1.0"
description = "<kind>=<name> for fedsim"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["fedsim>=<version>"]

[project.optional-dependencies]
dev = ["pytest>=8"]

[project.entry-points."fedsim.plugins"]
<name> = "<package>.configs"

[tool.setuptools.packages.find]
where = ["src"]

[tool.setuptools.package-data]
"*" = ["*.yaml"]

[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = "--import-mode=importlib"
"""

README = """\
# <project>

`<kind>=<name>` for fedsim: one sentence that says what it does, and its paper.

```
pip install -e .              # in this folder; from then on every `fedsim` command knows it
fedsim list <kind>
fedsim run <kind>=<name>
pip install -e '.[dev]' && pytest
```

| File | What it is |
|---|---|
| `src/<package>/<name>.py` | the method |
| `src/<package>/configs/<kind>/<name>.yaml` | its arguments and defaults; `fedsim list` shows its first line |
| `tests/test_<name>.py` | its laws, a case by hand, and a run |
| `pyproject.toml` | the entry point `fedsim.plugins`, by which fedsim finds the YAML |

Further choices, of this or any other group, are further YAML files under `src/<package>/configs/`.
"""
