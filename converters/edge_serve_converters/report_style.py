"""The look of a report: one style sheet for screens of all sizes, light and dark, and paper.

The series' colours are those of Okabe and Ito (Color Universal Design, 2008), darkened or lightened to be read on the
page's background; each has a marker and a dash of its own besides (plots.py). What is wider than the page scrolls by
itself, and a shadow at its edge shows that there is more.
"""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1f24;--soft:#57606a;--rule:#d0d7de;--card:#f6f8fa;
--good:#005f46;--bad:#a62b00;--warn:#7a4b00;--bar:#6f9fc4;--shade:rgba(27,31,36,.28);
--c0:#0072b2;--c1:#b35900;--c2:#00805f;--c3:#a8447f;--c4:#1f8fc9;--c5:#8a6d00;--c6:#4b3f9e;--c7:#444}
@media (prefers-color-scheme:dark){:root{--page:#12161c;--text:#e6edf3;--soft:#9aa7b4;--rule:#39424d;--card:#1b222b;
--good:#4fd1a5;--bad:#ff9166;--warn:#f0b849;--bar:#4f83ad;--shade:rgba(0,0,0,.75);
--c0:#56b4e9;--c1:#f0a030;--c2:#2fc79a;--c3:#e59ac4;--c4:#8fd0f5;--c5:#f0e442;--c6:#a99cf0;--c7:#c8c8c8}}
:root{--hint:linear-gradient(90deg,var(--page) 30%,transparent) left/2.6rem 100% no-repeat local,
linear-gradient(270deg,var(--page) 30%,transparent) right/2.6rem 100% no-repeat local,
linear-gradient(90deg,var(--shade),transparent) left/1rem 100% no-repeat scroll,
linear-gradient(270deg,var(--shade),transparent) right/1rem 100% no-repeat scroll}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main,header,footer{max-width:72rem;margin:0 auto;padding:0 1.1rem}
header{padding-top:1.6rem}
h1{font-size:1.65rem;line-height:1.2;margin:0 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--rule)}
h3{font-size:1.03rem;margin:1.3rem 0 .4rem;overflow-wrap:anywhere}
p{margin:.4rem 0 .7rem;max-width:52rem}
.note,figcaption,caption{color:var(--soft);font-size:.9rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.8rem 0 0;list-style:none;font-size:.93rem}
a{color:var(--c0)}
.verdict{list-style:none;padding:0;margin:.8rem 0}
.verdict li{padding:.55rem .8rem;margin:.4rem 0;background:var(--card);border-left:5px solid var(--rule);
border-radius:3px;overflow-wrap:anywhere}
.prose{white-space:pre-wrap;overflow-wrap:anywhere}
.verdict .good{border-color:var(--good)}.verdict .bad{border-color:var(--bad)}.verdict .warn{border-color:var(--warn)}
.good>b:first-child,td .yes{color:var(--good)}.bad>b:first-child,td .no{color:var(--bad)}.warn>b:first-child,td .warn{color:var(--warn)}
td .yes,td .no,td .warn{font-weight:600}
.scroll{overflow-x:auto;margin:.6rem 0 1rem;background:var(--hint)}
table{border-collapse:collapse;font-size:.92rem;min-width:20rem}
caption{text-align:left;padding:.2rem 0 .4rem}
th,td{padding:.32rem .7rem;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
thead th{border-bottom:2px solid var(--rule);font-weight:600;vertical-align:bottom}
tbody th{font-weight:600}
.w{min-width:12rem;max-width:26rem;overflow-wrap:anywhere}
td small,th small{display:block;color:var(--soft);font-weight:400}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
code,.hash{font-family:ui-monospace,"SFMono-Regular",Menlo,Consolas,monospace;font-size:.9em;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1rem}
.plot{margin:.4rem 0 .8rem;overflow-x:auto;max-width:48rem}
.plot svg{display:block;width:100%;min-width:26rem;height:auto}
svg text{fill:var(--text);font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
svg .title{fill:var(--soft)}svg .label{font-weight:600}
svg .grid{stroke:var(--rule);stroke-width:1;fill:none}svg .axis{stroke:var(--soft);stroke-width:1;fill:none}
svg .leader{stroke:var(--soft);stroke-width:.8;fill:none}
svg .line{fill:none;stroke:currentColor;stroke-width:1.8}
svg g[class^=c] circle,svg g[class^=c] path:not(.line){fill:currentColor;stroke:currentColor}
svg g[class^=c] .hollow{fill:var(--page);stroke-width:2}
svg g[class^=c] .spot{fill:transparent;stroke:none}svg g[class^=c] .spot:hover{fill:currentColor}
svg g[class^=c] .ring{fill:none;stroke:var(--bad);stroke-width:2.4}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
svg .bar{fill:var(--bar)}svg .range{stroke:var(--text);stroke-width:1.6;fill:none}svg .saturated{stroke:var(--bad);stroke-width:2.6}
svg.strip text{font-size:11px;fill:var(--soft)}svg.strip{display:block}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
footer{color:var(--soft);font-size:.88rem;padding-bottom:2rem;margin-top:2rem}
@media (max-width:40rem){.plot{background:var(--hint)}body{font-size:15px}th,td{padding:.3rem .45rem}}
@media print{details::details-content{content-visibility:visible;block-size:auto}
.w{min-width:5rem}td,th{padding:.2rem .3rem}table{font-size:8pt;min-width:0}
:root{color-scheme:light}nav{display:none}body{font-size:10pt}.scroll,.plot{overflow:visible;background:none}
.plot svg{min-width:0}section,figure,tr{break-inside:avoid-page}section{break-inside:auto}h2,h3{break-after:avoid}
.verdict li{border:1px solid;border-left-width:5px}}
"""
