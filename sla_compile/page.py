"""One self-contained HTML page about a model's attentions: what becomes of them and what that saves."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

from sla_compile.arithmetic import Operations, operations, readable
from sla_compile.examine import Examination
from sla_compile.passes.sites import Site
from sla_compile.snapshot import label

HEADS = 4
CLASSES = (  # value, what it is, colour
    (1, "critical: computed exactly", (178, 24, 43)),
    (0, "marginal: linear attention", (158, 202, 225)),
    (-1, "negligible: skipped", (232, 232, 232)),
)


def render(
    examination: Examination, model: Any = None, maps: Mapping[str, Tensor] | None = None, without_maps: str = ""
) -> str:
    """The page.

    Args:
        model: for the classes of the modules on the way to an attention.
        maps: int8 (H, T_m, T_n) by an attention's path; see block_maps.py.
        without_maps: why there are none.
    """
    page = _Page(examination, model if isinstance(model, nn.Module) else None)
    title = examination.report.title
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} - sla_compile</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + page.head()
        + page.arithmetic()
        + page.configurations()
        + page.tree()
        + page.maps(maps or {}, without_maps)
        + f"<footer>Written by sla_compile with torch {escape(torch.__version__)}.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


@dataclass
class _Node:
    """A module on the way to an attention."""

    name: str
    kind: str = ""
    sites: list[Site] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    def likeness(self) -> tuple:
        """Equal for modules that differ in their name alone."""
        sites = tuple((s.rewritten, s.reason, s.shape, s.keys, s.head_dim, s.config, s.calls) for s in self.sites)
        return self.kind, sites, tuple((name, child.likeness()) for name, child in self.children.items())


class _Page:
    def __init__(self, examination: Examination, model: nn.Module | None) -> None:
        self.report = examination.report
        self.silent = examination.silent
        self.configs = examination.configs
        used = dict.fromkeys(site.config for site in self.report.rewritten)
        self.labels = {fingerprint: label(number) for number, fingerprint in enumerate(used)}
        self.counts = [operations(site, self.configs.get(site.config)) for site in self.report]
        self.total = sum((count for count in self.counts if count is not None), Operations())
        self.root = _Node(self.report.title)
        for site in self.report:
            self._insert(site, model)

    def _insert(self, site: Site, model: nn.Module | None) -> None:
        node, module = self.root, model
        for part in site.name.split(".") if site.name else ():
            module = None if module is None else module._modules.get(part)
            kind = "" if module is None else type(module).__name__
            node = node.children.setdefault(part, _Node(part, kind))
        node.sites.append(site)

    def head(self) -> str:
        rewritten, all_rows = len(self.report.rewritten), len(self.report)
        text = (
            f"<header><h1>{escape(self.report.title)}</h1>\n<p><strong>{rewritten} of {all_rows}</strong> attentions "
            "run as sparse-linear attention, the others stay exactly what they were.</p></header>\n"
        )
        if self.silent:
            items = "".join(f"<li>{escape(told)}</li>" for told in self.silent)
            text += _section("Silently dense", f"<ul>{items}</ul>", "alarm")
        return text

    def arithmetic(self) -> str:
        total, unknown = self.total, self.counts.count(None)
        if not total.before:
            return _section("Arithmetic", '<p class="note">Lengths are not known without example inputs.</p>')
        share = 1 - total.after / total.before
        pairs = zip(self.counts, self.report, strict=True)
        dense = sum(count.exact for count, site in pairs if count is not None and not site.rewritten)
        parts = (
            ("critical blocks", total.exact - dense, "critical"),
            ("linear branch", total.linear, "marginal"),
            ("routing", total.routing, "routing"),
            ("attentions that stay dense", dense, "dense"),
        )
        bar = "".join(
            f'<i class="{kind}" style="width:{100 * part / total.before:.3f}%"></i>' for _, part, kind in parts
        )
        legend = "".join(
            f'<li><i class="{kind}"></i>{name} <b>{readable(part)}</b></li>' for name, part, kind in parts if part
        )
        notes = (
            "Products of one forward, two operations a multiply-add: 4&thinsp;L&sup2;&thinsp;D for a head of dense "
            "attention; the linear branch with its projection, and with the sums over marginal blocks as one product. "
            "Operations are not time."
        )
        if any((site.calls or 1) > 1 for site in self.report):
            notes += " Where an attention is called several times, its longest call is counted."
        if unknown:
            notes += f" Not counted, for want of a known length: {unknown}."
        return _section(
            "Arithmetic",
            f'<p class="sum"><span><small>dense</small>{readable(total.before)}</span><span><small>now</small>'
            f"{readable(total.after)}</span><span><small>saved</small>{share:.1%}</span></p>\n"
            f'<div class="bar" role="img" aria-label="{share:.1%} of the operations are saved">{bar}</div>\n'
            f'<ul class="legend">{legend}</ul>\n<p class="note">{notes}</p>',
        )

    def configurations(self) -> str:
        tables = []
        for fingerprint, letter in self.labels.items():
            if fingerprint not in self.configs:
                continue
            values = self.configs[fingerprint].to_dict().items()
            cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(_plain(v))}</dd></div>" for name, v in values)
            tables.append(f'<h3><b class="label">{letter}</b></h3><dl>{cells}</dl>')
        if not tables:
            return ""
        name = "Configuration" + "s" * (len(tables) > 1)
        return _section(name, "".join(tables), "configurations")

    def tree(self) -> str:
        body = "".join(self._attention(site) for site in self.root.sites) + self._children(self.root)
        return _section("Attentions", f'<div class="tree">{body}</div>')

    def _children(self, node: _Node) -> str:
        runs: list[list[_Node]] = []
        for child in node.children.values():
            last = runs[-1] if runs else None
            if last and child.name.isdigit() and last[-1].name.isdigit() and child.likeness() == last[-1].likeness():
                last.append(child)
            else:
                runs.append([child])
        items = "".join(f"<li>{self._item(run)}</li>" for run in runs)
        return f"<ul>{items}</ul>" if items else ""

    def _item(self, run: list[_Node]) -> str:
        node = run[0]
        name = escape(node.name) + (f"&hairsp;…&hairsp;{escape(run[-1].name)}" if len(run) > 1 else "")
        kind = f'<span class="kind">{escape(node.kind)}</span>' if node.kind else ""
        alike = f'<span class="alike">{len(run)} alike</span>' if len(run) > 1 else ""
        path = f'<span class="name">{name}</span>{kind}{alike}'
        attentions = "".join(self._attention(site) for site in node.sites)
        if not node.children:
            return f'<div class="leaf"><div class="path">{path}</div>{attentions}</div>'
        return f'<details open><summary class="path">{path}</summary>{attentions}{self._children(node)}</details>'

    def _attention(self, site: Site) -> str:
        if site.rewritten:
            badge = f'<span class="badge sla">sparse-linear <b>{self.labels[site.config]}</b></span>'
        else:
            badge = '<span class="badge exact">dense</span>'
        shape = f'<span class="shape">{escape(site.shape)} on {escape(site.keys)} keys</span>' if site.shape else ""
        if not shape and site.head_dim is not None:
            shape = f'<span class="shape">head dimension {site.head_dim}</span>'
        calls = f'<span class="shape">{site.calls} calls</span>' if (site.calls or 1) > 1 else ""
        count = operations(site, self.configs.get(site.config))
        flops = ""
        if count is not None and site.rewritten:
            saved = 1 - count.after / count.before
            change = "−" if saved >= 0 else "+"  # short sequences can cost more
            text = f"{readable(count.before)} → {readable(count.after)} <b>{change}{abs(saved):.0%}</b>"
            flops = f'<span class="flops">{text}</span>'
        elif count is not None:
            flops = f'<span class="flops">{readable(count.before)}</span>'
        why = f'<span class="why">{escape(site.reason)}</span>' if site.reason else ""
        return f'<div class="attention">{badge}{shape}{calls}{flops}{why}</div>'

    def maps(self, maps: Mapping[str, Tensor], without: str) -> str:
        if not maps:
            return _section("Block maps", f'<p class="note">{escape(without or "None were asked for.")}</p>')
        legend = "".join(f'<li><i style="background:rgb{color}"></i>{name}</li>' for _, name, color in CLASSES)
        text = (
            '<p class="note">How each block of queries (down) attends to each block of keys (across) in a run with the '
            f'example inputs: first batch entry, first heads.</p><ul class="legend">{legend}</ul>\n'
        )
        linear = {fingerprint: config.linear for fingerprint, config in self.configs.items()}
        without_linear = {site.name for site in self.report if linear.get(site.config) == "none"}
        for name, block_map in maps.items():
            total, rows, columns = block_map.shape
            figures = "".join(
                f'<figure><img src="{png(block_map[head])}" alt="block map of head {head}">'
                f"<figcaption>head {head}</figcaption></figure>"
                for head in range(min(total, HEADS))
            )
            told = f"{rows} × {columns} blocks, {total} heads: {_shares(block_map)}"
            if name in without_linear:
                told += "; without a linear branch, marginal blocks are skipped too"
            kind = f'<span class="kind">{told}</span>'
            text += f'<h3>{escape(name or "the model itself")}{kind}</h3><div class="maps">{figures}</div>\n'
        return _section("Block maps", text)


def _section(title: str, body: str, kind: str = "") -> str:
    return f"<section{f' class={kind}' if kind else ''}>\n<h2>{title}</h2>\n{body}\n</section>\n"


def _plain(value: Any) -> str:
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _shares(block_map: Tensor) -> str:
    return ", ".join(
        f"{(block_map == value).float().mean().item():.1%} {name.partition(':')[0]}" for value, name, _ in CLASSES
    )


def png(block_map: Tensor) -> str:
    """A block map (T_m, T_n) as a data URI: one pixel a block, two bits a pixel."""
    rows, columns = block_map.shape
    indices = torch.zeros(rows, -(-columns // 4) * 4, dtype=torch.uint8)
    for index, (value, _, _) in enumerate(CLASSES):
        indices[:, :columns][block_map == value] = index
    packed = (indices.view(rows, -1, 4) << torch.tensor([6, 4, 2, 0], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    lines = b"".join(b"\0" + bytes(row) for row in packed.tolist())  # filter 0: none
    palette = bytes(channel for _, _, color in CLASSES for channel in color)
    header = struct.pack(">IIBBBBB", columns, rows, 2, 3, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


_STYLE = """
:root { --ink: #1f2933; --soft: #66727f; --line: #e4e7eb; --critical: #b2182b; --marginal: #9ecae1; --dense: #8a94a0;
  --routing: #f0b35a; --paper: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { margin: 0 0 .6rem; font-size: 1.05rem; }
h3 { margin: 1rem 0 .4rem; font-size: .95rem; overflow-wrap: anywhere; }
header p { margin: .3rem 0 1.2rem; }
section { margin: 0 0 1rem; padding: 1rem 1.1rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: .5rem; }
.alarm { border-color: var(--critical); }
.alarm h2 { color: var(--critical); }
.note, footer { margin: .5rem 0 0; color: var(--soft); font-size: .85rem; }
.sum { display: flex; flex-wrap: wrap; gap: .3rem 2.2rem; margin: 0 0 .7rem; font-size: 1.3rem; font-weight: 600; }
.sum small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }
.bar { display: flex; height: 1.1rem; overflow: hidden; background: #eef0f3; border-radius: .25rem; }
i.critical { background: var(--critical); } i.marginal { background: var(--marginal); }
i.routing { background: var(--routing); } i.dense { background: var(--dense); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin: .6rem 0 0; padding: 0; list-style: none;
  font-size: .85rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.configurations h3 { margin: .6rem 0 .3rem; }
dl { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: 0; }
dt { color: var(--soft); font-size: .78rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.label { display: inline-block; padding: 0 .45em; border-radius: .25rem; background: #e4eef8; color: #1c4f82; }
.tree ul { margin: 0; padding: 0 0 0 1.1rem; list-style: none; border-left: 1px solid var(--line); }
.tree > ul { padding-left: 0; border: 0; }
.path { padding: .15rem 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
.name { font-family: ui-monospace, monospace; font-weight: 600; }
.kind, .alike, .shape { color: var(--soft); font-size: .82rem; font-weight: 400; }
.kind, .alike { margin-left: .6em; }
.alike { padding: 0 .5em; background: #eef0f3; border-radius: 1em; }
.leaf { padding: .1rem 0 .35rem; }
.attention { display: flex; flex-wrap: wrap; align-items: baseline; gap: .1rem .8rem; font-size: .85rem; }
.badge { padding: 0 .55em; border-radius: .25rem; }
.badge.sla { background: #e2f2e6; color: #17602c; } .badge.exact { background: #eef0f3; color: #4a5562; }
.flops { margin-left: auto; font-variant-numeric: tabular-nums; white-space: nowrap; }
.why { flex-basis: 100%; color: #7a4b00; overflow-wrap: anywhere; }
.maps { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { flex: 1 1 11rem; max-width: 15rem; margin: 0; }
figure img { display: block; width: 100%; border: 1px solid var(--line); image-rendering: pixelated; }
figcaption { margin-top: .25rem; color: var(--soft); font-size: .78rem; }
@media (max-width: 34rem) { h1 { font-size: 1.25rem; } .flops { margin-left: 0; } section { padding: .8rem; } }
"""
