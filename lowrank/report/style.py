"""Style sheet of the report: light or dark by the browser's setting, narrow or wide screens."""

from __future__ import annotations

STYLE = """\
:root {
  --page: #f9f9f7; --surface: #fdfdfc; --ink: #0b0b0b; --soft: #52514e; --line: #dddcd6;
  --track: #e6e5df; --one: #2a78d6; --two: #c2410c; --three: #0f7f5c; --four: #4a3aa7;
  --old: #a09e96;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d0d0d; --surface: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --line: #3a3935;
    --track: #383835; --one: #5ba3ee; --two: #f08a4b; --three: #35b88d; --four: #a59cf5;
    --old: #77756d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; }
h3 { font-size: 0.95rem; margin: 0; overflow-wrap: anywhere; }
h4 { font-size: 0.8rem; font-weight: 500; color: var(--soft); margin: 12px 0 4px; }
.lead, footer { color: var(--soft); margin: 0; }
footer { margin-top: 40px; font-size: 0.85rem; }
.lead + .tiles { margin-top: 8px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.tile, .card, .scroll {
  background: var(--surface); border: 1px solid var(--line); border-radius: 8px;
}
.tile { padding: 12px 14px; }
.tile h3 { font-weight: 500; color: var(--soft); font-size: 0.85rem; }
.tile p { margin: 0; font-size: 0.85rem; color: var(--soft); }
.tile .big { font-size: 1.7rem; font-weight: 600; line-height: 1.3; color: var(--ink); }
.bar {
  display: block; height: 6px; border-radius: 3px; background: var(--track); margin: 4px 0 8px;
}
.bar > span {
  display: block; height: 100%; border-radius: 3px; background: var(--one); min-width: 2px;
}
td .bar { min-width: 120px; background: none; height: 7px; margin: 2px 0; }
td .bar.before > span { background: var(--old); }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--one); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.85rem; }
caption { text-align: left; padding: 10px 14px 10px 9px; color: var(--soft); }
caption span {
  display: inline-block; position: sticky; left: 9px; max-width: min(100%, 100vw - 62px);
}
small { display: block; color: var(--soft); font-size: 0.9em; font-weight: 400; }
th, td {
  padding: 7px 9px; text-align: left; border-top: 1px solid var(--line); white-space: nowrap;
}
thead th { font-weight: 500; color: var(--soft); vertical-align: bottom; }
tbody th, tfoot th { font-weight: 600; }
tbody th, tfoot th, thead th:first-child { position: sticky; left: 0; background: var(--surface); }
tbody th {
  white-space: normal; overflow-wrap: anywhere; min-width: 9em; max-width: 20em;
}
@media (min-width: 900px) { tbody th { min-width: 13em; } }
tfoot td, tfoot th { font-weight: 600; border-top: 2px solid var(--line); }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.slower { color: var(--two); font-weight: 600; }
.share { display: inline-block; min-width: 3em; color: var(--soft); }
.cards {
  display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr));
}
.card { padding: 14px; min-width: 0; }
svg { display: block; width: 100%; height: auto; max-width: 420px; }
svg text { font: 10.5px system-ui, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .tick { stroke: var(--soft); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .front { stroke: var(--one); stroke-width: 1.25; }
svg .option { fill: var(--one); stroke: var(--surface); stroke-width: 1; }
svg .chosen { fill: var(--two); stroke: var(--surface); stroke-width: 2; }
svg .c0 { stroke: var(--one); } svg .c1 { stroke: var(--two); stroke-dasharray: 6 3; }
svg .c2 { stroke: var(--three); stroke-dasharray: 2 3; }
svg .c3 { stroke: var(--four); stroke-dasharray: 8 3 2 3; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 0; margin: 8px 0;
  font-size: 0.8rem; color: var(--soft);
}
.legend li::before {
  content: ""; display: inline-block; width: 16px; height: 0; margin-right: 6px;
  vertical-align: middle; border-top: 2px solid var(--one);
}
.legend .c1::before { border-top: 2px dashed var(--two); }
.legend .c2::before { border-top: 2px dotted var(--three); }
.legend .c3::before { border-top: 2px dashed var(--four); }
.legend .option::before, .legend .chosen::before {
  width: 7px; height: 7px; border: 0; border-radius: 50%; background: var(--one);
}
.legend .chosen::before { width: 11px; height: 11px; background: var(--two); }
#notes ul { padding-left: 1.2em; max-width: 75ch; }
#notes li { margin: 6px 0; }
@media print { .scroll { overflow: visible; } }
"""
