"""The page's style sheet: light and dark by the reader's setting, paper, and phones.

Heat colours are mixed from --paper towards --gain, --loss or --share, whose full strength still
carries --ink at a contrast of 4.5 to 1; a test computes it.
"""

LIGHT = {
    "ink": "#17202a",
    "soft": "#566373",
    "paper": "#ffffff",
    "raised": "#f5f7f9",
    "rule": "#d9dfe6",
    "accent": "#0b6e8a",
    "main": "#e3f2f6",
    "good": "#0f6b3c",
    "bad": "#a3271c",
    "gain": "#6cc79a",
    "loss": "#f0978a",
    "share": "#7db4ea",
    "c0": "#059bd0",
    "c1": "#c68510",
    "c2": "#3e4f00",
    "c3": "#702f6b",
    "c4": "#3450bb",
    "c5": "#9e8e60",
    "c6": "#962848",
    "c7": "#7d9498",
}
DARK = {
    "ink": "#e8edf2",
    "soft": "#9aa8b6",
    "paper": "#11161c",
    "raised": "#1a2129",
    "rule": "#303b46",
    "accent": "#5cc3de",
    "main": "#12323d",
    "good": "#6fd39b",
    "bad": "#ff9384",
    "gain": "#1c6b47",
    "loss": "#8c3529",
    "share": "#2568a8",
    "c0": "#2ee3fe",
    "c1": "#fbc14a",
    "c2": "#b7e69d",
    "c3": "#bd5b8c",
    "c4": "#5e80e2",
    "c5": "#7d8200",
    "c6": "#dc475d",
    "c7": "#cbbeb7",
}


def style() -> str:
    """Return the style sheet."""
    lines = "".join(f".c{i}{{stroke:var(--c{i});--key:var(--c{i})}}" for i in range(8))
    light, dark = f":root{{{_variables(LIGHT)}}}", f":root{{{_variables(DARK)}}}"
    return f"{light}@media screen and (prefers-color-scheme:dark){{{dark}}}{RULES}{lines}{PAPER}"


def _variables(colours: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in colours.items())


RULES = """
:root{color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1200px;margin:0 auto;padding:2rem clamp(1rem,4vw,2.5rem) 4rem}
h1{font-size:clamp(1.6rem,4.5vw,2.4rem);line-height:1.15;margin:0;letter-spacing:-.02em;
overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:3rem 0 .6rem;padding-top:.9rem;border-top:1px solid var(--rule);
letter-spacing:-.01em}
h3{font-size:1.02rem;margin:1.6rem 0 .5rem}
h3 small{font-weight:400;color:var(--soft)}
.kicker{color:var(--accent);font-weight:600;letter-spacing:.06em;text-transform:uppercase;
font-size:.78rem;margin:0 0 .3rem}
.meta{color:var(--soft);margin:.5rem 0 0;font-size:.92rem;overflow-wrap:anywhere}
.lead{font-size:1.12rem;max-width:64ch;margin:1.2rem 0}
.read{color:var(--soft);font-size:.88rem;max-width:88ch;margin:.55rem 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,165px),1fr));gap:.7rem;
margin:1.4rem 0}
.tile{background:var(--raised);border:1px solid var(--rule);border-radius:10px;padding:.75rem .9rem;
overflow-wrap:anywhere}
.tile dt{color:var(--soft);font-size:.82rem;margin:0}
.tile dd{margin:.1rem 0 0;font-size:1.5rem;font-weight:650;letter-spacing:-.02em;line-height:1.25;
font-variant-numeric:tabular-nums}
.tile dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft);letter-spacing:0}
nav{margin:1.2rem 0 0;font-size:.9rem;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem}
a{color:var(--accent)}
.wide{overflow-x:auto;margin:.4rem 0 0;border:1px solid var(--rule);border-radius:10px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.87rem;
font-variant-numeric:tabular-nums}
th,td{padding:.4rem .65rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--rule)}
tr:last-child>*{border-bottom:0}
thead th{background:var(--raised);color:var(--soft);font-weight:600;vertical-align:bottom;
line-height:1.25;font-size:.8rem;overflow-wrap:break-word;min-width:4.2rem;max-width:9rem}
th[scope=row],thead th:first-child{text-align:left;position:sticky;left:0;z-index:1;
min-width:8.5rem;max-width:15rem;overflow-wrap:anywhere}
tbody th{background:var(--paper);font-weight:500}
td small,th small{display:block;color:var(--soft);font-size:.76rem;font-weight:400;
white-space:nowrap}
th small{white-space:normal}
td{white-space:nowrap}
td.text,th.text{text-align:left;white-space:normal;min-width:5rem;overflow-wrap:break-word}
.long{min-width:11rem!important;max-width:none!important}
tr.break>*{border-top:2px solid var(--rule)}
tr.main>*{background:var(--main)}
tr.main th{box-shadow:inset 4px 0 0 var(--accent);font-weight:700}
.best{font-weight:750;color:var(--good)}
.best::after{content:"★";position:absolute;font-size:.72em;padding:.12em 0 0 .15em}
.good{color:var(--good);font-weight:650}
.bad{color:var(--bad);font-weight:650}
.heat td{text-align:center;vertical-align:middle;border:1px solid var(--paper);padding:.5rem .4rem;
min-width:4.4rem}
.heat thead th{text-align:center}
.heat th[scope=row]{vertical-align:middle;border-bottom-color:var(--paper)}
.heat thead th:first-child{text-align:left}
.heat td.hot{background:color-mix(in srgb,var(--tint) calc(var(--heat)*100%),var(--paper))}
.heat td.hot small{color:inherit}
.heat td.own{box-shadow:inset 0 0 0 2.5px var(--ink);font-weight:700}
.gain{--tint:var(--gain)}
.loss{--tint:var(--loss)}
.share{--tint:var(--share)}
.layers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,255px),1fr));gap:1rem;
margin-top:1rem}
.layers .wide{margin:.2rem 0 0}
.layers+.wide{margin-top:1rem}
.layers h3{margin:0;font-size:.88rem}
.layers table{font-size:.74rem;table-layout:fixed}
.layers td,.layers th{padding:.22rem .2rem;min-width:0!important;overflow-wrap:anywhere}
.layers thead th:not(:first-child){max-width:none;max-height:7rem;font-size:.7rem;font-weight:500;
text-align:left;writing-mode:vertical-rl;transform:rotate(180deg);vertical-align:middle;
white-space:nowrap;overflow:hidden;text-overflow:ellipsis;padding:.3rem .1rem}
.layers thead th:first-child,.layers th[scope=row]{width:30%}
.layers>.many{grid-column:1/-1}
.many table{table-layout:auto}
.layers .many td{min-width:1.7rem!important}
.layers .many thead th:first-child,.layers .many th[scope=row]{min-width:6rem!important}
.scale{display:flex;align-items:center;gap:.5rem;color:var(--soft);font-size:.8rem;margin:.6rem 0 0;
flex-wrap:wrap}
.ramp{width:150px;height:.8rem;border-radius:3px;border:1px solid var(--rule)}
.ramp.turn{background:linear-gradient(90deg,var(--loss),var(--paper),var(--gain))}
.ramp.up{background:linear-gradient(90deg,var(--paper),var(--share))}
.forest{display:grid;grid-template-columns:minmax(7rem,max-content) minmax(90px,1fr) max-content;
align-items:stretch;font-size:.87rem;border:1px solid var(--rule);border-radius:10px;
overflow:hidden;margin:.6rem 0 0}
.forest>div{display:contents}
.forest>div>*{padding:.22rem .65rem;border-bottom:1px solid var(--rule);overflow-wrap:anywhere;
max-width:20rem}
.forest>div>.track{max-width:none}
.forest>div:last-child>*{border-bottom:0}
.forest small{display:block;color:var(--soft);font-size:.76rem;line-height:1.3}
.forest .value{text-align:right;font-variant-numeric:tabular-nums}
.forest .main .name{font-weight:700;box-shadow:inset 4px 0 0 var(--accent)}
.forest .track{padding:0 1.1rem}
.forest .main>*{background:var(--main)}
.plot{position:relative;height:100%;min-height:1.9rem}
.plot i{position:absolute;display:block}
.plot .at{top:0;bottom:0;border-left:1.5px dashed var(--accent);opacity:.65}
.plot .span{top:50%;height:4px;margin-top:-2px;background:var(--soft);opacity:.55;border-radius:2px;
min-width:2px}
.plot .dot{top:50%;width:10px;height:10px;margin:-5px 0 0 -5px;border-radius:50%;
background:var(--soft);border:1.5px solid var(--paper)}
.main .plot .dot{background:var(--accent);width:13px;height:13px;margin:-6.5px 0 0 -6.5px}
.oracle .plot .dot{background:var(--paper);border:2px solid var(--soft)}
.plot .out{right:-.6rem;top:50%;margin-top:-.75em;color:var(--soft);font-style:normal;
line-height:1.5}
.forest .ruler>*{background:var(--raised);color:var(--soft);font-size:.76rem}
.ruler .plot{min-height:1.2rem}
.ruler .plot i{white-space:nowrap;transform:translateX(-50%);font-style:normal;
font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1rem}
.chart{margin:0;border:1px solid var(--rule);border-radius:10px;padding:.7rem .8rem .6rem;
min-width:0;break-inside:avoid}
.chart figcaption{font-size:.85rem;overflow-wrap:anywhere}
.chart figcaption small{color:var(--soft)}
svg{display:block;width:100%;height:auto;margin:.35rem 0 .1rem}
svg text{fill:var(--soft);font-size:11.5px;font-variant-numeric:tabular-nums}
svg .end{text-anchor:end}
svg .middle{text-anchor:middle}
svg .grid{stroke:var(--rule);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg path{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg circle{fill:var(--paper);stroke-width:1.6}
svg .faint{opacity:.55;stroke-width:1.3}
svg .dashed{stroke-dasharray:5 3}
.legend{display:flex;flex-wrap:wrap;gap:.05rem .9rem;font-size:.78rem;color:var(--soft);
overflow-wrap:anywhere}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:14px;height:0;border-top:3px solid var(--key,var(--soft));
vertical-align:middle;margin-right:.4em}
.key.faint{opacity:.6}
.key.dashed{border-top-style:dashed}
.key.block{height:10px;border:0;background:var(--key);border-radius:2px}
.bars{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr max-content;gap:.35rem .8rem;
font-size:.85rem;align-items:center;margin:.8rem 0}
.bars>*{overflow-wrap:anywhere;max-width:16rem}
.bar{display:flex;height:16px;border-radius:4px;overflow:hidden;background:var(--raised);
max-width:none}
.bar i{background:var(--key);height:100%}
.bar i+i{border-left:1px solid var(--paper)}
.facts{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;margin:.8rem 0;font-size:.92rem}
.facts dt{color:var(--soft);font-size:.8rem}
.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
ul.notes{max-width:88ch;padding-left:1.2rem;overflow-wrap:anywhere}
.passage{white-space:pre-wrap;overflow-wrap:anywhere;max-width:88ch;margin:.4rem 0;
font-size:.92rem;line-height:1.7}
.said{background:color-mix(in srgb,var(--key) 25%,var(--paper));border-radius:3px;
padding:.08em 0;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.said.dotted{text-decoration:underline dotted var(--key) 2px}
.said.double{text-decoration:underline double var(--key)}
.key.block.dotted{outline:2px dotted var(--key);outline-offset:1px}
.key.block.double{outline:3px double var(--key);outline-offset:1px}
.key.plain{border:1px solid var(--soft)}
.spoken{border-left:3px solid var(--rule);padding-left:.8rem;margin:.7rem 0}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,230px),1fr));gap:.8rem}
.sides>div{border:1px solid var(--rule);border-radius:10px;padding:.5rem .8rem;min-width:0}
.sides>.main{border-color:var(--accent)}
h4{font-size:.82rem;font-weight:600;color:var(--soft);margin:0;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr));gap:.8rem}
.card{border:1px solid var(--rule);border-radius:10px;padding:.7rem .8rem;min-width:0;
overflow-wrap:anywhere;break-inside:avoid;font-size:.88rem}
.card img{max-width:100%;border-radius:6px;vertical-align:top;margin:0 .3rem .4rem 0}
.card p{margin:.2rem 0 .5rem;white-space:pre-wrap}
.card small{display:block;color:var(--soft);font-size:.76rem}
.card dl{margin:0;display:grid;grid-template-columns:max-content 1fr;gap:.15rem .7rem}
.card dt{color:var(--soft);max-width:7rem}
.card dd{margin:0;white-space:pre-wrap}
details{margin:.9rem 0 0}
summary{cursor:pointer;font-size:.9rem;font-weight:600}
.origins{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;font-size:.86rem;
margin:.4rem 0 0}
.origins dt{font-weight:600}
.origins dd{margin:0;color:var(--soft)}
footer{margin-top:3rem;color:var(--soft);font-size:.82rem;border-top:1px solid var(--rule);
padding-top:.8rem}
@media (max-width:640px){main{padding-top:1.2rem}h2{margin-top:2.2rem}th,td{padding:.35rem .5rem}
th[scope=row],thead th:first-child{min-width:7rem;max-width:9.5rem}
.forest{grid-template-columns:minmax(6rem,8.5rem) 1fr max-content}
.forest>div>*{padding:.22rem .45rem}.heat td{min-width:3.7rem}.tiles{grid-template-columns:1fr 1fr}
.tile dd{font-size:1.25rem}.bars{grid-template-columns:minmax(5rem,7rem) 1fr max-content}}
"""

PAPER = """
@page{size:A4 landscape;margin:12mm}
@media print{*{print-color-adjust:exact;-webkit-print-color-adjust:exact}:root{font-size:11px}
body{font-size:11px}main{max-width:none;padding:0}nav{display:none}h2,h3{break-after:avoid}
h2{margin-top:1.4rem}tr,.tile,.chart,.layers>div,.forest>div>*,table.heat{break-inside:avoid}
.wide{overflow:visible}table{font-size:.8rem}th,td{padding:.2rem .35rem}
th[scope=row],thead th:first-child{position:static}.charts{grid-template-columns:repeat(3,1fr)}
.layers{grid-template-columns:repeat(4,1fr)}}
"""
