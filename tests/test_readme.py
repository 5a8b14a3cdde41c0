"""README's tables of flags are those of the scripts."""

import dataclasses
import re

import pytest
from conftest import ROOT
from test_scripts import SCRIPTS

HEADING = "### `{}`\n"


def table(config_class):
    """The table of flags that README holds for a script."""
    lines = ["| flag | meaning | default |", "|---|---|---|"]
    plain = {dataclasses.MISSING: "required", (): ""}
    for field in dataclasses.fields(config_class):
        text, _, default = field.metadata["help"].partition(" (default: ")
        assert default or field.default is not None, f"the help of {field.name} does not tell its default"
        shown = default.rstrip(")") or plain.get(field.default, f"`{field.default}`")
        lines.append(f"| `--{field.name}` | {text} | {shown} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_readme_shows_the_flags_as_they_are(name):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(HEADING.format(name))[1]
    assert re.split(r"\n(?=#)", section)[0].strip() == table(SCRIPTS[name]).strip()
