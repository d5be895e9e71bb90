"""The templates of the page, for Jinja2.

They are text in a module and no files beside it, because Modal ships a package's .py files only
(`Image.add_local_python_source`).
"""

# The whole file around the sections
PAGE = """\
{% import "blocks.html" as blocks %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}: MoleForge {{ kind }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<p class="kicker">MoleForge {{ kind }}</p>
<h1>{{ title }}</h1>
<p class="meta">{{ facts|join(" · ") }}</p>
{% if lead %}
<p class="lead">{{ lead }}</p>
{% endif %}
</header>
{% if tiles %}
<dl class="tiles">
{% for name, value, note in tiles %}
<div class="tile"><dt>{{ name }}</dt><dd>{{ value }}{{ blocks.small(note) }}</dd></div>
{% endfor %}
</dl>
{% endif %}
<nav aria-label="sections">
{% for section in sections %}
<a href="#{{ section.id }}">{{ section.heading }}</a>
{% endfor %}
</nav>
{% for section in sections %}
<section id="{{ section.id }}">
<h2>{{ section.heading }}</h2>
{{ section.body }}
</section>
{% endfor %}
<footer>Made by MoleForge. This file is complete in itself; the numbers behind it are in
{{ numbers }}.</footer>
</main>
</body>
</html>
"""

# Macros for tables and pictures; `column_class` and the like are functions of page.py
BLOCKS = """\
{% macro small(text) %}{% if text %}<small>{{ text }}</small>{% endif %}{% endmacro %}

{% macro reading(text) %}
{% if text %}
<p class="read">{{ text }}</p>
{% endif %}
{% endmacro %}

{# A table with its reading; nothing without rows. ramp names the colours of its heat, where it has
any: turn (loss to gain) or up (share). #}
{% macro table(drawn, ramp="") %}
{% if drawn.rows %}
<div class="wide" tabindex="0" role="region" aria-label="{{ drawn.title }}">
<table{{ {"class": "heat" if ramp else none, "aria-label": drawn.title}|xmlattr }}>
<thead>
<tr>
<th scope="col">{{ drawn.corner }}</th>
{% for name in drawn.columns %}
<th scope="col"{{ {"class": column_class(drawn, loop.index0) or none}|xmlattr }}>{{ name }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for row in drawn.rows %}
{% set classes = row_class(drawn, loop.index0) %}
<tr{{ {"class": classes or none}|xmlattr }}>
<th scope="row">{{ row.name }}{{ small(row.note) }}</th>
{% for cell in row.cells %}
{% set text = column_class(drawn, loop.index0) %}
<td{{ cell_attributes(cell, text, ramp)|xmlattr }}>
{%- if cell.best %}<span class="best">{{ cell.text }}</span>{% else %}{{ cell.text }}{% endif %}
{{- small(cell.small) }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{{ reading((drawn.reading ~ " " ~ drawn.colours)|trim) }}
{% endif %}
{% endmacro %}

{# A table and the scale of its colours. #}
{% macro heat(drawn, ramp) %}
{% if drawn.rows %}
{{ table(drawn, ramp) }}
<div class="scale">{{ drawn.scale[0] }}<span class="ramp {{ ramp }}"></span>{{ drawn.scale[1] }}
</div>
{% endif %}
{% endmacro %}

{% macro titled(drawn) %}
{% if drawn.rows %}
<h3>{{ drawn.title }}</h3>
{{ table(drawn) }}
{% endif %}
{% endmacro %}

{# Small maps side by side; each drawn as `table` or `heat` draws it. One of many columns has the
page's width, in which its figures have room, and what has no room there is reached by a scroll. #}
{% macro maps(tables, scaled) %}
{% if tables %}
<div class="layers">
{% for drawn in tables %}
<div{{ {"class": "many" if drawn.columns|length > 8 else none}|xmlattr }}>
<h3>{{ drawn.title }}</h3>{{ heat(drawn, "up") if scaled else table(drawn, "up") }}</div>
{% endfor %}
</div>
{% endif %}
{% endmacro %}

{% macro fact_list(facts) %}
{% if facts %}
<dl class="facts">
{% for name, value in facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% endmacro %}

{% macro forest(drawn) %}
{% if drawn %}
<div class="forest">
<div class="ruler">
<span>bits per byte, mean</span>
<span class="track"><div class="plot">
{% for text, left in drawn.marks %}
<i style="left:{{ left|percent }}">{{ text }}</i>
{% endfor %}
</div></span>
<span></span>
</div>
{% for row in drawn.rows %}
<div{{ {"class": row.look or none}|xmlattr }}>
<span class="name">{{ row.name }}{{ small(row.note) }}</span>
<span class="track"><div class="plot">
{% if drawn.stack is not none %}
<i class="at" style="left:{{ drawn.stack|percent }}"></i>
{% endif %}
{% if row.dot is none %}
<i class="out">→</i>
{% else %}
{% if row.bar %}
<i class="span" style="left:{{ row.bar[0]|percent }};width:{{ row.bar[1]|percent }}"></i>
{% endif %}
<i class="dot" style="left:{{ row.dot|percent }}"></i>
{% endif %}
</div></span>
<span class="value">{{ row.value }}</span>
</div>
{% endfor %}
</div>
{{ reading("Further left is better. Dot: mean over domains; bar: its 95 % interval; dashed: the " ~
  "stack; hollow: the oracle; arrow: off the scale.") }}
{% endif %}
{% endmacro %}

{% macro bars(jobs) %}
{% if jobs %}
<div class="bars">
{% for bar in jobs %}
<span>{{ bar.job }}</span>
<div class="bar">
{%- for look, width in bar.pieces %}<i class="{{ look }}" style="width:{{ width|percent }}"></i>
{%- endfor %}</div>
<span>{{ bar.time }}</span>
{% endfor %}
</div>
<div class="legend">
{% for name, look in phases %}
<span><i class="key block {{ look }}"></i>{{ name }}</span>
{% endfor %}
</div>
{% endif %}
{% endmacro %}

{# Who speaks: names in the colours of their pieces. #}
{% macro speakers(drawn) %}
<div class="legend">
{% for each in drawn %}
<span><i class="key block {{ each.look }}"></i>{{ each.name }}
{%- if each.share %} <b>{{ each.share }}</b>{% endif %}</span>
{% endfor %}
</div>
{% endmacro %}

{# A text as it is, blanks and lines included: nothing of the template may come between. #}
{% macro passage(said, goes_on=false) %}
<p class="passage" dir="auto">
{%- for each in said -%}
{%- if each.look -%}
<span class="said {{ each.look }}" title="{{ each.speaker }}">{{ each.text }}</span>
{%- else -%}
{{ each.text }}
{%- endif -%}
{%- endfor -%}
{%- if goes_on %} …{% endif -%}
</p>
{% endmacro %}

{# Requests with their pictures, which are in the page. #}
{% macro cards(drawn) %}
{% if drawn.cards %}
<h3>{{ drawn.title }}</h3>
<div class="cards">
{% for card in drawn.cards %}
<div class="card">
{% for picture in card.pictures %}
<img src="{{ picture }}" alt="picture {{ loop.index }} of the request">
{% endfor %}
<p dir="auto">{{ card.prompt }}{{ small(card.note) }}</p>
<dl>
{% for line in card.lines %}
<dt>{{ line.name }}</dt>
<dd dir="auto"{{ {"class": line.tone or none}|xmlattr }}>{{ line.text }}{{ small(line.small) }}</dd>
{% endfor %}
</dl>
</div>
{% endfor %}
</div>
{{ reading(drawn.reading) }}
{% endif %}
{% endmacro %}

{% macro charts(drawn) %}
<div class="charts">
{% for each in drawn %}
{{ chart(each) }}
{% endfor %}
</div>
{% endmacro %}

{% macro chart(drawn) %}
{% set label = drawn.title ~ ", " ~ drawn.unit if drawn.unit else drawn.title %}
<figure class="chart">
<figcaption><b>{{ drawn.title }}</b>
{%- if drawn.unit %}<small> {{ drawn.unit }}</small>{% endif %}</figcaption>
<svg viewBox="0 0 {{ frame.width }} {{ frame.height }}" role="img" aria-label="{{ label }}">
{% for tick in drawn.y_ticks %}
<line x1="{{ frame.left }}" x2="{{ frame.right }}" y1="{{ tick.at|place }}"
 y2="{{ tick.at|place }}" class="grid"></line>
<text x="{{ frame.left - 6 }}" y="{{ (tick.at + 3.5)|place }}" class="end">{{ tick.text }}</text>
{% endfor %}
{% for tick in drawn.x_ticks %}
<text x="{{ tick.at|place }}" y="{{ frame.bottom + 15 }}" class="middle">{{ tick.text }}</text>
{% endfor %}
<line x1="{{ frame.left }}" x2="{{ frame.right }}" y1="{{ frame.bottom }}"
 y2="{{ frame.bottom }}" class="axis"></line>
<text x="{{ frame.right }}" y="{{ frame.bottom + 29 }}" class="end">tokens</text>
{% for line in drawn.lines %}
<g><title>{{ line.name }}: {{ line.last }} at the end</title>
{% for path in line.paths %}
<path d="{{ path }}" class="{{ line.look }}"></path>
{% endfor %}
{% for x, y in line.dots %}
<circle cx="{{ x|place }}" cy="{{ y|place }}" r="2.4" class="{{ line.look }}"></circle>
{% endfor %}
</g>
{% endfor %}
</svg>
<div class="legend">
{% for line in drawn.lines %}
<span><i class="key {{ line.look }}"></i>{{ line.name }} <b>{{ line.legend }}</b></span>
{% endfor %}
</div>
</figure>
{% endmacro %}
"""

# Sections of more than one table
QUALITY = """\
{% import "blocks.html" as blocks %}
{{ blocks.forest(forest) }}
{{ blocks.titled(quality) }}
<details open="open"><summary>Where the rows come from</summary>
<dl class="origins">
{% for word, text in origins %}
<dt>{{ word }}</dt><dd>{{ text }}</dd>
{% endfor %}
</dl>
</details>
{{ blocks.titled(cost) }}
"""

ROUTING = """\
{% import "blocks.html" as blocks %}
{{ blocks.fact_list(facts) }}
{{ blocks.heat(mean, "up") }}
{% if layers %}
<h3>Layer by layer<small> per cent of a domain's tokens</small></h3>
{{ blocks.maps(layers, scaled=false) }}
{% endif %}
{{ blocks.table(by_layer) }}
{% if charts %}
<h3>While the router trained</h3>
{{ blocks.charts(charts) }}
{% endif %}
"""

REQUESTS = """\
{% import "blocks.html" as blocks %}
{{ blocks.table(routes) }}
{{ blocks.table(margins) }}
{{ blocks.maps(confusions, scaled=true) }}
{% for drawn in others %}
{{ blocks.titled(drawn) }}
{% endfor %}
"""

CURVES = """\
{% import "blocks.html" as blocks %}
{% if missing %}
<ul class="notes">
{% for job, words in missing.items() %}
<li>The history of {{ job }} is not whole: {{ words }}. Its curves lack that.</li>
{% endfor %}
</ul>
{% endif %}
{% for each in stages %}
<h3>{{ each.stage }}<small> {{ each.jobs }} job{{ "s" if each.jobs > 1 }}</small></h3>
{{ blocks.charts(each.charts) }}
{% endfor %}
{{ blocks.reading("Horizontal: tokens the job has trained on. The first steps of a loss may run " ~
  "out of the top; the number behind a name is the last value; a gap is a value that was not " ~
  "finite" ~ (", or steps that the history has lost" if missing) ~ ". Long histories are drawn " ~
  "as means over neighbours (memory: the greatest).") }}
"""

SAMPLES = """\
{% import "blocks.html" as blocks %}
{{ blocks.speakers(speakers) }}
{% for domain, texts in passages.items() %}
<h3>{{ domain }}</h3>
{% for each in texts %}
<div class="spoken">
{{ blocks.passage(each.said, each.goes_on) }}
{{ blocks.speakers(each.speakers) }}
</div>
{% endfor %}
{% endfor %}
{{ blocks.reading("The first held-out texts of each domain, chosen by nobody. A colour is the " ~
  "expert with the most weight over all layers where a token is read, or the one that reads the " ~
  "whole text; without a colour: the base. Below each text, shares of its tokens.") }}
"""

CONTINUATIONS = """\
{% import "blocks.html" as blocks %}
{% if speakers %}
{{ blocks.speakers(speakers) }}
{% endif %}
{% for each in beginnings %}
<h3>{{ each.domain }}</h3>
<p class="passage" dir="auto">{{ each.prompt }}</p>
<div class="sides">
{% for side in each.written %}
<div{{ {"class": "main" if side.main else none}|xmlattr }}>
<h4>{{ side.writer }}</h4>
{{ blocks.passage(side.said) }}
{% if side.speakers %}
{{ blocks.speakers(side.speakers) }}
{% endif %}
</div>
{% endfor %}
</div>
{% endfor %}
{{ blocks.reading(reading) }}
"""

NOTES = """\
<ul class="notes">
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
"""

TEMPLATES = {
    "page.html": PAGE,
    "blocks.html": BLOCKS,
    "quality.html": QUALITY,
    "routing.html": ROUTING,
    "requests.html": REQUESTS,
    "curves.html": CURVES,
    "samples.html": SAMPLES,
    "continuations.html": CONTINUATIONS,
    "notes.html": NOTES,
}
