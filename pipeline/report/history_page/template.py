"""The template and the rules of the page of histories."""

RULES = """
.controls{position:sticky;top:0;z-index:5;background:var(--paper);padding:.6rem 0;margin:1rem 0 0;
border-bottom:1px solid var(--rule);display:flex;flex-wrap:wrap;gap:.4rem .5rem;max-height:40vh;
overflow:auto}
.controls button,.controls select,.line,.whole{font:inherit;font-size:.82rem;color:var(--ink);
background:var(--raised);border:1px solid var(--rule);border-radius:8px;padding:.25rem .6rem;
cursor:pointer;overflow-wrap:anywhere;text-align:left;max-width:100%}
.controls button[aria-pressed=false],.line[aria-pressed=false]{opacity:.45;
text-decoration:line-through}
.controls label{font-size:.82rem;color:var(--soft)}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;background:var(--key);
margin-right:.4em;vertical-align:-1px}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
.chart{position:relative}
.chart figcaption{display:flex;justify-content:space-between;gap:.5rem;align-items:baseline}
.place{height:230px;margin:.3rem 0}
.u-over{touch-action:pan-y}
.u-select{background:color-mix(in srgb,var(--accent) 22%,transparent)}
.lines{display:flex;flex-wrap:wrap;gap:.2rem .3rem;max-height:8.5rem;overflow:auto}
.line{background:none;border-color:transparent;padding:.05rem .3rem;font-size:.76rem;
color:var(--soft)}
.line:hover{border-color:var(--rule)}
.line b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.whole{font-size:.74rem;padding:0 .5rem;white-space:nowrap}
.whole[hidden]{display:none}
.tip{position:absolute;z-index:6;pointer-events:none;background:var(--ink);color:var(--paper);
border-radius:6px;padding:.25rem .5rem;font-size:.76rem;max-width:15rem;overflow-wrap:anywhere}
.tip[hidden]{display:none}
.heats{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:1rem;
margin:1rem 0 0}
.heat{margin:0;border:1px solid var(--rule);border-radius:10px;padding:.7rem .8rem;min-width:0;
position:relative}
.heat[hidden]{display:none}
.heat figcaption{font-size:.85rem;font-weight:600;overflow-wrap:anywhere;margin:0 0 .4rem}
.cells{display:grid;gap:1px}
.cells i{min-height:17px;background:color-mix(in srgb,var(--share) calc(var(--heat)*100%),
var(--raised));border-radius:1px}
.cells i:hover{outline:2px solid var(--ink)}
.cells span{font-size:.74rem;color:var(--soft);padding-right:.5em;overflow:hidden;
text-overflow:ellipsis;white-space:nowrap}
.ends{display:flex;justify-content:space-between;font-size:.74rem;color:var(--soft)}
@media (max-width:640px){.place{height:200px}.controls{max-height:30vh}}
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ page.title }}: MoleForge history</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<p class="kicker">MoleForge history</p>
<h1>{{ page.title }}</h1>
<p class="meta">{{ page.meta }}</p>
</header>
<noscript><p class="lead">The curves are drawn by the script in this file, which this reader does
not run. The tables are below.</p></noscript>
<div class="controls" role="group" aria-label="runs" id="controls">
<label>along <select id="along">
<option value="step">steps</option><option value="tokens">tokens</option>
<option value="hours">hours</option>
</select></label>
</div>
<p class="read">A button above shows or hides a run, a name below a chart one line. Drag over a
chart, or spread two fingers, to zoom; double click, or &ldquo;all&rdquo;, to see all of it.</p>
<div id="sections"></div>
{% for table in page.tables %}
{% if table.rows %}
<section>
<h2>{{ table.title }}</h2>
<div class="wide" tabindex="0" role="region" aria-label="{{ table.title }}">
<table aria-label="{{ table.title }}">
<thead><tr>
{% for name in table.columns %}
<th scope="col" class="text">{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}
<td class="text">{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if table.note %}
<p class="read">{{ table.note }}</p>
{% endif %}
</section>
{% endif %}
{% endfor %}
{% if page.notes %}
<section>
<h2>Notes</h2>
<ul class="notes">
{% for note in page.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
</section>
{% endif %}
<footer>Made by MoleForge. This file is complete in itself. Curves by uPlot, (c) Leon Sorokin, MIT
licence.</footer>
</main>
<script type="application/json" id="data">{{ data }}</script>
<script>
// Under the C locale a browser calls its language en-US@posix, at which the library below gives up.
try {
  new Intl.NumberFormat(navigator.language);
} catch (_) {
  Object.defineProperty(navigator, "language", { value: "en-US" });
}
</script>
<script>{{ library }}</script>
<script>{{ script }}</script>
</body>
</html>
"""
