"""Style sheet of the HTML report: light and dark, from a phone's width up, and on paper."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f8fa; --ink: #1b1f24; --muted: #57606a; --line: #d0d7de;
  --faster: #0969da; --slower: #bc4c00; --level: #8c959f; --error: #cf222e;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df;
  --c4: #9a6700; --c5: #bf3989; --c6: #0b7285; --c7: #57606a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --card: #161b22; --ink: #e6edf3; --muted: #9198a1; --line: #30363d;
    --faster: #58a6ff; --slower: #f0883e; --level: #7d8590; --error: #ff7b72;
    --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff;
    --c4: #d4a72c; --c5: #f778ba; --c6: #39c5cf; --c7: #9198a1;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; text-size-adjust: 100%;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p { margin: .4rem 0; }
.muted, figcaption small { color: var(--muted); }
.error { color: var(--error); font-weight: 600; }
code, pre, textarea { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: .8rem; }
pre { margin: .4rem 0; padding: .6rem .75rem; background: var(--card); border-radius: 6px;
  border: 1px solid var(--line); overflow-x: auto; }
a { color: var(--c0); }
nav a { display: inline-block; margin-right: .9rem; padding: .3rem 0; }
summary { cursor: pointer; padding: .25rem 0; }
.counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.2rem, 1fr)); gap: .5rem;
  list-style: none; margin: .75rem 0; padding: 0; }
.counts li { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  border-top: 4px solid var(--tone, var(--line)); padding: .4rem .7rem; }
.counts strong { display: block; font-size: 1.6rem; line-height: 1.2; }
.counts small, .value small { display: block; color: var(--muted); }
.counts .faster { --tone: var(--faster); }
.counts .slower { --tone: var(--slower); }
.counts .level { --tone: var(--level); }
.counts .bad { --tone: var(--error); }
.notes { padding-left: 1.1rem; margin: .5rem 0; }
.bars { list-style: none; margin: .5rem 0; padding: 0; }
.bars li { display: grid; grid-template-columns: minmax(0, 1fr) 7.8rem; gap: 0 .75rem;
  align-items: center; padding: .3rem 0; border-bottom: 1px solid var(--line); }
.bars li > :first-child { grid-column: 1 / -1; }
.bars .only { grid-column: 1 / -1; }
.bars .scale { padding: 0; color: var(--muted); }
.bars .value { font-variant-numeric: tabular-nums; line-height: 1.3; font-size: .9rem; }
.bars small, .bars .versus { color: var(--muted); font-size: .8rem; }
.value .faster { color: var(--faster); font-weight: 600; }
.value .slower { color: var(--slower); font-weight: 600; }
.value .level { color: var(--muted); font-weight: 600; }
@media (max-width: 46rem) {
  td small { display: block; }
}
@media (min-width: 46rem) {
  .bars li { grid-template-columns: minmax(0, 21rem) minmax(0, 1fr) 9.5rem; }
  .bars li > :first-child { grid-column: auto; }
  .bars .only { grid-column: 2 / -1; }
}
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr));
  gap: .9rem; }
figure { margin: 0; padding: .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; min-width: 0; }
figcaption { font-weight: 600; font-size: .9rem; margin-bottom: .4rem; }
figcaption small { display: block; font-weight: 400; }
.wide { max-width: 46rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .5rem 0;
  padding: 0; }
.legend li { display: flex; align-items: center; gap: .4rem; min-width: 0; }
.legend svg { flex: none; }
svg { display: block; overflow: visible; }
svg.defs { position: absolute; }
svg text { fill: var(--muted); font-size: 11px; }
svg .axis { fill: var(--ink); }
.grid { stroke: var(--line); stroke-width: 1; }
.one { stroke: var(--ink); stroke-width: 1.5; }
rect.faster { fill: var(--faster); }
rect.slower { fill: var(--slower); }
rect.level { fill: var(--level); }
.roof { stroke: var(--ink); stroke-width: 2; stroke-linecap: round; }
.mark { fill: var(--c); stroke: var(--card); stroke-width: 1; }
.path { stroke: var(--c); stroke-width: 2; }
line.whisker { stroke: var(--c, var(--ink)); stroke-width: 1.25; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); } .s7 { --c: var(--c7); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
tbody th[scope=row] { position: sticky; left: 0; background: var(--page); font-weight: 400;
  white-space: normal; min-width: 7.2rem; max-width: 13rem; border-right: 1px solid var(--line); }
tbody .ours th, tbody .ours td { font-weight: 600; }
td.why { text-align: left; white-space: normal; min-width: 18rem; font-weight: 400; }
td small { color: var(--muted); font-weight: 400; }
td .faster { color: var(--faster); }
td .slower { color: var(--slower); }
th.case { background: var(--card); text-align: left; white-space: normal; font-weight: 400;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
th.case > div { position: sticky; left: .6rem; max-width: min(60rem, calc(100vw - 3.5rem)); }
dl { display: grid; grid-template-columns: minmax(7rem, auto) minmax(0, 1fr); gap: .2rem 1rem;
  margin: .5rem 0; }
dt { color: var(--muted); }
dd { margin: 0; }
textarea { width: 100%; height: 22rem; background: var(--card); color: var(--ink);
  border: 1px solid var(--line); border-radius: 6px; padding: .6rem; white-space: pre;
  overflow: auto; }
@media print { .scroll { overflow: visible; } textarea { height: auto; } }
"""
