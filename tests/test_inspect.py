"""``sla-compile inspect`` and ``sla-compile check``: what they say, exit codes, and the page."""

import base64
import json
import re
import struct
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import SelfAttention, TinyDiT, make_inputs
from torch import nn

import sla_compile
from sla_compile import SLAConfig, cli
from sla_compile.arithmetic import critical_share, operations, readable
from sla_compile.block_maps import block_maps, pick
from sla_compile.passes.sites import Site

USER_MODULE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import sla_compile, torch
from models import SelfAttention, build as make, make_inputs

WHAT = 3

def build():
    return make()

def inputs():
    return make_inputs()

def by_name():
    return dict(zip(("x", "context"), make_inputs(context=64)))

def accelerated():
    return sla_compile.accelerate(make(), config=sla_compile.SLAConfig(sparsity=0.7, min_seq_len=64))

def silent():
    model = accelerated()
    model.blocks[0].attn = SelfAttention()
    return model

def mixed():
    model = make(depth=3)
    model.blocks[1].attn.num_heads = 4
    return model

def fails():
    raise RuntimeError("weights are gone")

def leaves():
    raise SystemExit(3)

def linear():
    return torch.nn.Linear(2, 2)

def talks():
    print("building")
    return make()

def odd_names():
    model = torch.nn.Sequential()
    model.add_module("<b>[/x]", SelfAttention())
    model.add_module("[bold]y", sla_compile.accelerate(SelfAttention(), config=sla_compile.SLAConfig(min_seq_len=64)))
    return model

def one_input():
    return make_inputs()[:1]

def wrong_inputs():
    return make_inputs(dim=31)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command line in a folder with dit.py: exit code, what it printed, what it complained."""
    (tmp_path / "dit.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delitem(sys.modules, "dit", raising=False)

    def run(line):
        try:
            code = cli.main(line.split())
        except SystemExit as stopped:  # argparse's own
            code = stopped.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.mark.parametrize("place", ["dit", "dit.py"])
def test_inspect_prints_a_table(run, place):
    code, out, err = run(f"inspect {place}:build --inputs {place}:inputs --min-seq-len 64")
    assert (code, err) == (0, "")
    assert "TinyDiT: 2 of 4 attentions rewritten" in out and "blocks.1.text" in out and "cross-attention" in out
    assert "(1, 2, 200, 16)" in out and "% saved" in out


def test_files_of_one_name_are_different_files(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dit.py").write_text("import torch\ninputs = torch.zeros(1, 77, 32), torch.zeros(1, 9, 32)\n")
    code, out, _ = run("inspect dit.py:build --inputs other/dit.py:inputs --min-seq-len 64")
    assert code == 0 and "(1, 2, 77, 16)" in out


def test_inspect_prints_json(run, tmp_path):
    (tmp_path / "sla.json").write_text('{"sparsity": 0.5, "min_seq_len": 64, "linear": "none"}')
    code, out, _ = run(
        "inspect dit:build --inputs dit:by_name --config sla.json --sparsity 0.75 --exclude *.0.attn --json"
    )
    values = json.loads(out)
    assert code == 0 and values["model"] == "TinyDiT" and not values["accelerated"]
    (config,) = values["configurations"].values()
    assert (config["sparsity"], config["linear"], config["min_seq_len"]) == (0.75, "none", 64)
    rows = {row["name"]: row for row in values["attentions"]}
    assert [name for name, row in rows.items() if row["rewritten"]] == ["blocks.1.attn"]
    assert rows["blocks.0.attn"]["reason"] == "excluded" and rows["blocks.0.text"]["keys"] == "64"
    assert rows["blocks.0.attn"]["operations"]["before"] == 4 * 2 * 200 * 200 * 16
    assert values["operations"]["before"] == sum(row["operations"]["before"] for row in rows.values())


def test_what_the_model_prints_is_no_json(run):
    code, out, err = run("inspect dit:talks --json")
    assert code == 0 and json.loads(out)["model"] == "TinyDiT" and err == "building\n"


def test_names_are_no_markup(run, tmp_path):
    code, out, _ = run("inspect dit:odd_names --inputs dit:one_input --html page.html")
    assert code == 1 and "silently dense: <b>[/x] (1, 2, 200, 16)" in out and "│ [bold]y " in out
    page = Page((tmp_path / "page.html").read_text())
    assert "<b>[/x]" in page and "[bold]y" in page


def test_inspect_without_inputs_and_on_the_meta_device(run):
    code, out, _ = run("inspect dit:build --meta --json")
    assert code == 0 and [row["operations"] for row in json.loads(out)["attentions"]] == [None] * 4
    code, out, _ = run("inspect dit:build --inputs dit:inputs --min-seq-len 64 --meta")
    assert code == 0 and "2 of 4 attentions rewritten" in out


def test_an_accelerated_model_is_verified(run):
    code, out, _ = run("inspect dit:accelerated --inputs dit:inputs")
    assert code == 0 and "2 of 4 attentions rewritten" in out
    code, out, _ = run("inspect dit:silent")
    assert code == 1 and "silently dense: blocks.0.attn: its redirect is gone" in out
    code, _, err = run("check dit:silent --expect 1")
    assert code == 1 and "silently dense" in err


def test_check(run, tmp_path):
    line = "check dit:build --inputs dit:inputs --min-seq-len 64"
    assert run(f"{line} --snapshot s.json --update")[:2] == (
        0, "TinyDiT: 2 of 4 attentions rewritten, written to s.json\n",
    )  # fmt: skip
    assert run(f"{line} --snapshot s.json --expect 2")[:2] == (
        0,
        "TinyDiT: 2 of 4 attentions rewritten, as in s.json\n",
    )
    assert run(f"{line} --expect *.attn")[0] == 0
    code, out, err = run(f"{line} --snapshot s.json --sparsity 0.5")
    assert (code, out) == (1, "") and "--- s.json" in err and '+    "A": {"sparsity": 0.5' in err
    assert run(f"{line} --expect blocks.0.*")[0] == run(f"{line} --expect 3")[0] == 1
    code, _, err = run(f"{line} --snapshot other/new.json")
    assert code == 1 and "written now" in err and (tmp_path / "other" / "new.json").is_file()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("build", "expected my.module:function"),
        ("nowhere:build", "importing nowhere failed: ModuleNotFoundError: No module named 'nowhere'"),
        ("nowhere.py:build", "there is no file nowhere.py"),
        ("broken.py:build", "importing broken.py failed: SyntaxError"),
        ("alone.py:build", "alone.py:1); name a file of a package by its module, as my.module:function"),
        ("dit:nothing", "dit has no nothing"),
        ("dit:fails", "failed: RuntimeError: weights are gone ("),
        ("dit:leaves", "failed: SystemExit: 3"),
        ("dit:WHAT", "returned a int, expected a torch.nn.Module"),
        ("dit:linear", "no attention was found in this Linear; with --inputs"),
        ("dit:build --inputs dit:fails", "--inputs dit:fails failed: RuntimeError: weights are gone"),
        ("dit:build --inputs dit:WHAT", "example_inputs must be a tuple"),
        ("dit:build --inputs dit:wrong_inputs", "does not run with these example_inputs"),
        ("dit:build --sparsity 2", "sparsity must be in (0, 1), got 2.0"),
        ("dit:build --sparsity many", "invalid float value"),
        ("dit:build --config none.json", "No such file"),
        ("dit:build --config dit.py", "is not JSON"),
        ("dit:build --config list.json", "must hold one object"),
        ("dit:build --config unknown.json", "unknown SLAConfig fields ['speed']"),
        ("dit:build --include mid.*", "include pattern 'mid.*' matches no attention; found: blocks.0.attn"),
        ("dit:accelerated --sparsity 0.5", "accelerated already: config would say"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "check"])
def test_mistakes_are_told_without_traceback(run, tmp_path, command, line, told):
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "alone.py").write_text("from .dit import build\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "unknown.json").write_text('{"speed": 9}')
    code, _, err = run(f"{command} {line}")
    assert code == 2 and told in err and "Traceback" not in err


def test_mistakes_of_one_command(run, tmp_path):
    (tmp_path / "folder").mkdir()
    for line, told in (
        ("check dit:build --update", "say where with --snapshot"),
        ("check dit:build --snapshot dit.py", "is not a snapshot"),
        ("inspect dit:build --html no/such/page.html", "the folder no/such does not exist"),
        ("inspect dit:build --html folder", "--html folder: Is a directory"),
        ("check dit:build --snapshot folder", "--snapshot folder: Is a directory"),
        ("check dit:build --snapshot dit.py/s.json", "--snapshot dit.py/s.json: Not a directory"),
        ("inspect dit:build --maps -1", "expected a whole number"),
    ):
        code, _, err = run(line)
        assert code == 2 and told in err and "Traceback" not in err


# ---- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements must close in order; keeps text, sources and links."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.kinds = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        assert tag not in ("script", "link", "iframe") and "href" not in attrs
        if tag == "img":
            assert attrs["src"].startswith("data:image/png;base64,") and attrs["alt"]
            self.images.append(attrs["src"].partition(",")[2])
        if tag not in self.VOID:
            self.open.append(tag)
        self.kinds.append(attrs.get("class"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def __contains__(self, text):
        return text in " ".join(" ".join(self.text).split())


def pixels(encoded):
    """The palette indices of a PNG with two bits a pixel."""
    data = base64.b64decode(encoded)
    chunks, position = {}, 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        assert struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        position += 12 + length
    columns, rows, depth, color = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, color) == (2, 3)
    lines, stride = zlib.decompress(chunks[b"IDAT"]), 1 + -(-columns // 4)
    assert len(lines) == rows * stride
    return torch.tensor(
        [[lines[r * stride + 1 + c // 4] >> (6 - 2 * (c % 4)) & 3 for c in range(columns)] for r in range(rows)]
    )


def test_page(run, tmp_path):
    code, _, err = run(
        "inspect dit:mixed --inputs dit:inputs --min-seq-len 64 --sparsity 0.7 --html page.html --maps 2"
    )
    assert (code, err) == (0, "")
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|@import|url\(", text)
    page = Page(text)
    for told in ("3 of 6", "TinyDiT", "SelfAttention", "blocks ModuleList", "cross-attention", "sparsity 0.7", "saved"):
        assert told in page, told
    assert page.kinds.count("alike") == 0 and page.kinds.count("attention") == 6, "the middle block differs"
    # The pictures are the block maps: colours in the order critical, marginal, negligible.
    model, inputs = sys.modules["dit"].mixed(), make_inputs()
    config = SLAConfig(sparsity=0.7, min_seq_len=64)
    maps = block_maps(model, inputs, {f"blocks.{i}.attn": config for i in (0, 2)})
    expected = [head for block_map in maps.values() for head in block_map]
    assert len(page.images) == len(expected) == 4
    for image, head in zip(page.images, expected, strict=True):
        assert torch.equal(pixels(image), 1 - head.long())
    assert "marginal blocks are skipped too" not in page
    (tmp_path / "none.json").write_text('{"linear": "none"}')
    options = "--min-seq-len 64 --config none.json --html page.html"
    assert run(f"inspect dit:build --inputs dit:inputs {options}")[0] == 0
    assert "marginal blocks are skipped too" in Page((tmp_path / "page.html").read_text())


def test_page_folds_blocks_that_are_alike_and_does_without_maps(run, tmp_path):
    for options, told in (
        ("", "give example inputs with --inputs"),
        ("--inputs dit:inputs --meta", "which a model on the meta device does not have"),
        ("--inputs dit:inputs", "No attention is rewritten"),
        ("--inputs dit:inputs --maps 0", "None were asked for"),
    ):
        assert run(f"inspect dit:build {options} --html page.html")[0] == 0
        page = Page((tmp_path / "page.html").read_text())
        assert told in page and "2 alike" in page and page.kinds.count("attention") == 2 and not page.images


def test_page_of_a_silently_dense_model(run, tmp_path):
    assert run("inspect dit:silent --html page.html")[0] == 1
    assert "Silently dense" in Page((tmp_path / "page.html").read_text())


# ---- what the page is made of ----------------------------------------------------------------------------------------


def test_block_maps_are_those_of_the_run():
    attention, (x, _) = SelfAttention().eval(), make_inputs()
    config = SLAConfig(sparsity=0.7, min_seq_len=64)
    query, key, _ = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    expected = sla_compile.route(query, key, config=config)[0]
    model = nn.Sequential(attention).train()
    assert torch.equal(block_maps(model, (x,), {"0": config})["0"], expected) and attention.training
    sla_compile.accelerate(model, config=config)
    assert torch.equal(block_maps(model, (x,), {"0": config})["0"], expected) and not model[0].sla._forward_pre_hooks
    assert block_maps(TinyDiT(), make_inputs(), {"blocks.0": config}) == {}


def test_pick_spreads_evenly():
    names = [str(i) for i in range(9)]
    assert [pick(names, count) for count in (0, 1, 2, 3)] == [[], ["0"], ["0", "8"], ["0", "4", "8"]]
    assert pick(names, 20) == names and pick(["a", "a", "b"], 2) == ["a", "b"]


@pytest.mark.parametrize(
    "config",
    [
        SLAConfig(sparsity=0.8),
        SLAConfig(sparsity=0.8, block_q=128, pinned=(70, 10)),
        SLAConfig(critical_blocks=3, linear="all"),
        SLAConfig(sparsity=0.5, linear="none", pinned=(10_000, 0)),
    ],
    ids=str,
)
def test_operations(config):
    length, dim = 1000, 8
    query = torch.randn(1, 2, length, dim)
    block_map = sla_compile.route(query, query, config=config)
    share = (block_map == 1).double().mean().item()
    assert critical_share(length, config) == pytest.approx(share)
    site = Site("a", True, shape=str(tuple(query.shape)), keys=str(length))
    count = operations(site, config)
    dense = 2 * (2 * length * length * dim) * 2  # two heads; scores and sums of values
    assert count.before == dense and count.exact == pytest.approx(share * dense)
    rows, columns = block_map.shape[2:]
    summaries = reading = projection = 2 * (2 * length * dim * dim)
    sums = 2 * (2 * rows * columns * dim * dim)
    linear = {"marginal": summaries + reading + projection + sums, "all": 3 * summaries, "none": 0}[config.linear]
    assert count.linear == linear and count.after == pytest.approx(
        count.exact + linear + 2 * (2 * rows * columns * dim)
    )


def test_operations_of_what_stays_dense_or_is_not_known():
    dense = operations(Site("a", False, "excluded", "(1, 2, 100, 8)", "30"), None)
    assert dense.before == dense.after == 4 * 2 * 100 * 30 * 8
    for shape, keys in (("", ""), ("(1, 2, s0, 8)", "s0"), ("(1, 2, 100, 8)", "")):
        assert operations(Site("a", True, shape=shape, keys=keys), SLAConfig()) is None
    assert operations(Site("a", True, shape="(1, 2, 100, 8)", keys="100"), None) is None
    assert (dense + dense).before == 2 * dense.before


def test_readable():
    numbers = (0, 12, 999.4, 999.6, 1234, 5.06e9, 1.5e15, 4.2e18)
    assert [readable(n) for n in numbers] == [
        "0 FLOP", "12 FLOP", "999 FLOP", "1 kFLOP", "1.23 kFLOP", "5.06 GFLOP", "1.5 PFLOP", "4200 PFLOP",
    ]  # fmt: skip
