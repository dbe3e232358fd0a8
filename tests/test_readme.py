"""README.md tells the truth: its Python runs, its commands exist, its options table is the configuration."""

import dataclasses
import re
from pathlib import Path

import pytest

from sla_compile import SLAConfig, cli

pytest.importorskip("diffusers")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    (\S.*)$", re.sub(r"(?ms)^```.*?^```$", "", README), re.MULTILINE)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def test_there_are_examples():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), names)
    if "compiled" in names:
        assert "1 of 2 attentions rewritten" in capsys.readouterr().out
        assert names["denoised"].shape == names["video"].shape
        assert (tmp_path / "sla.safetensors").is_file()
    else:
        assert names["output"].shape == (1, 4, 1000, 64)
        assert names["block_map"].shape == (1, 4, 16, 16)


def test_options_table_is_the_configuration():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.MULTILINE))
    fields = {field.name: repr(field.default).replace("'", '"') for field in dataclasses.fields(SLAConfig)}
    assert rows == fields


def test_commands_are_the_real_ones(capsys):
    install, demo, tests = COMMANDS
    assert install == 'pip install -c constraints.txt -e ".[demo]"'
    with pytest.raises(SystemExit) as stopped:
        cli.main([*demo.removeprefix("sla-compile ").split(), "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    options = re.findall(r"`(--[\w-]+)`", README)
    assert options
    assert all(option in told for option in options)
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
