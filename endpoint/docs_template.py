"""The page of GET /docs, for jinja2 with autoescape: no script, nothing fetched from elsewhere."""

from __future__ import annotations

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }} interface</title>
<style>
:root {
  --page: #f6f7f9; --card: #fff; --text: #1c2330; --quiet: #5d6878; --line: #dde2ea; --code: #eef1f5;
  --accent: #a6192e; --get: #17693f; --get-soft: #e2f4ea; --post: #174f9c; --post-soft: #e3edfb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151c; --card: #191f29; --text: #e4e8ef; --quiet: #98a4b5; --line: #2c3543; --code: #232b38;
    --accent: #ff8090; --get: #7edcab; --get-soft: #17372a; --post: #91bcff; --post-soft: #1a2f52;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
a { color: var(--post); text-decoration: none; }
a:hover, a:focus-visible { text-decoration: underline; }
code, pre { font: .875em/1.45 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace; }
header { border-bottom: 1px solid var(--line); background: var(--card); padding: 1.6rem 1.25rem 1.3rem; }
header > div, main { max-width: 84rem; margin: 0 auto; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -.01em; }
h1 span { color: var(--accent); }
h2 { margin: 2.4rem 0 .2rem; font-size: 1.3rem; }
h3 {
  margin: 1.5rem 0 .5rem; font-size: .8rem; color: var(--quiet);
  text-transform: uppercase; letter-spacing: .07em;
}
h4 { margin: 1.3rem 0 .4rem; font-size: .95rem; }
p { margin: .4rem 0; }
.quiet { color: var(--quiet); }
main { display: grid; grid-template-columns: 17rem minmax(0, 1fr); gap: 2.5rem; padding: 0 1.25rem 4rem; }
nav {
  position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto;
  padding: 1.6rem 0; font-size: .875rem;
}
nav b { display: block; margin: 1rem 0 .2rem; }
nav b:first-child { margin-top: 0; }
nav a { display: block; padding: .14rem 0; color: var(--quiet); overflow-wrap: anywhere; }
.planes {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .8rem; margin: 1rem 0 0;
}
.planes div { border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem; }
.planes b, .planes code { display: block; }
details.operation {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin: .5rem 0;
  overflow: hidden;
}
details.operation > summary {
  display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem .75rem; padding: .65rem .9rem;
  cursor: pointer; list-style: none;
}
details.operation > summary::-webkit-details-marker { display: none; }
details.operation > summary:hover { background: var(--code); }
details.operation[open] > summary { border-bottom: 1px solid var(--line); }
details.operation > div { padding: .4rem .9rem 1.1rem; }
.method {
  min-width: 3.4rem; padding: .1rem .45rem; border-radius: .35rem; text-align: center;
  font-size: .75rem; font-weight: 700; letter-spacing: .04em;
}
.get { background: var(--get-soft); color: var(--get); }
.post { background: var(--post-soft); color: var(--post); }
.path { font-weight: 600; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .42rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > td { border-bottom: 0; }
th { background: var(--code); font-size: .78rem; color: var(--quiet); font-weight: 600; }
td.name { width: 30%; overflow-wrap: anywhere; }
td.name code { background: none; padding: 0; }
td.value { width: 17%; }
.need { color: var(--accent); }
pre {
  margin: .35rem 0; padding: .75rem .9rem; overflow-x: auto; background: var(--code); border-radius: .5rem;
  white-space: pre; tab-size: 2;
}
td code, p code, li code { background: var(--code); border-radius: .3rem; padding: .06rem .28rem; }
.inner { margin: .6rem 0 0; }
.inner > summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
ul.plain { margin: .3rem 0; padding: 0; list-style: none; }
ul.plain li { margin: .2rem 0; }
@media (max-width: 60rem) {
  main { display: block; }
  nav { display: none; }
}
@media (max-width: 40rem) {
  table, tbody, tr, td { display: block; width: 100%; }
  thead { display: none; }
  td.name, td.value { width: 100%; }
  tr { border-bottom: 1px solid var(--line); padding: .45rem 0; }
  tr:last-child { border-bottom: 0; }
  td { border: 0; padding: .08rem .7rem; }
  td:empty { display: none; }
  td[data-label]::before { content: attr(data-label) ": "; color: var(--quiet); }
}
@media print { nav { display: none; } main { display: block; } }
</style>
</head>
<body>
<header><div>
  <h1><span>{{ title }}</span> interface</h1>
  <p class="quiet">Version {{ version }}. {{ description }}
  The same as a file: <a href="openapi.json">openapi.json</a>.
  A <b class="need">*</b> marks what must be sent.</p>
  <div class="planes">
    {%- for plane in planes %}
    <div><b>{{ plane.name | capitalize }}</b><code>{{ plane.url }}</code>
    <span class="quiet">{{ plane.meaning }}</span></div>
    {%- endfor %}
  </div>
</div></header>
<main>
<nav aria-label="Routes">
  {%- for plane in planes %}
  <b>{{ plane.name | capitalize }}</b>
  {%- for family in plane.families %}{% for operation in family.operations %}
  <a href="#{{ operation.id }}">{{ operation.path }}</a>
  {%- endfor %}{% endfor %}
  {%- endfor %}
  <b><a href="#errors">Errors</a></b>
</nav>
<div>
{%- for plane in planes %}
<section>
<h2>{{ plane.name | capitalize }} plane</h2>
<p class="quiet">{{ plane.meaning }} <code>{{ plane.url }}</code></p>
{%- for family in plane.families %}
<h3>{{ family.name }}</h3>
{%- for operation in family.operations %}
<details class="operation" id="{{ operation.id }}">
<summary><span class="method {{ operation.method }}">{{ operation.method | upper }}</span>
<code class="path">{{ operation.path }}</code>
<span class="quiet">{{ operation.summary | coded }}</span></summary>
<div>
{%- if operation.parameters %}
<h4>In the address</h4>
{{ tables.asked(operation.parameters) }}
{%- endif %}
{%- for body in operation.bodies %}
<h4>Body{% if operation.bodies | length > 1 %}: {{ body.meaning }}{% endif %}</h4>
{{ tables.asked(body.rows) }}
{%- if body.ignored %}
<p class="quiet">Accepted and ignored: {% for name in body.ignored %}<code>{{ name }}</code>
{%- if not loop.last %}, {% endif %}{% endfor %}.</p>
{%- endif %}
{%- endfor %}
<h4>Example{% if operation.examples | length > 1 %}s{% endif %}</h4>
{%- for example in operation.examples %}
{%- if example.title %}<p class="quiet">{{ example.title }}</p>{% endif %}
<pre><code>{{ example.command }}</code></pre>
{%- endfor %}
<h4>Answers</h4>
<ul class="plain">
{%- for answer in operation.answers %}
<li><code>{{ answer.status }}</code> {{ answer.meaning | coded }}</li>
{%- endfor %}
</ul>
{%- for shape in operation.shapes %}
<details class="inner"><summary>{{ shape.title }}</summary>
{{ tables.answered(shape.rows) }}
</details>
{%- endfor %}
</div>
</details>
{%- endfor %}
{%- endfor %}
</section>
{%- endfor %}
<section id="errors">
<h2>Errors</h2>
<p class="quiet">Every error is one object: <code>error</code> names the field, its value, what is legal there
and what to do; <code>error_type</code> and <code>type</code> name its class. In a stream that has begun
it is the last frame.</p>
<div class="scroll"><table><thead><tr><th>Status</th><th>Class</th><th>When</th></tr></thead><tbody>
{%- for row in errors %}
<tr><td><code>{{ row.status }}</code></td><td>{{ row.name }}</td><td>{{ row.meaning }}</td></tr>
{%- endfor %}
</tbody></table></div>
</section>
</div>
</main>
</body>
</html>
"""

TABLES = """\
{% macro name(row, mark) %}
<td class="name"><code><span class="quiet">{{ row.inside }}</span>{{ row.name }}
{%- if mark and row.required %}<b class="need" title="required">&#8202;*</b>{% endif %}</code></td>
{%- endmacro %}

{% macro asked(rows) %}
<div class="scroll"><table>
<thead><tr><th>Field</th><th>Value</th><th>Default</th><th>Meaning</th></tr></thead><tbody>
{%- for row in rows %}
<tr>{{ name(row, true) }}
<td class="value">{{ row.value }}</td>
<td class="value"{% if row.default %} data-label="Default"{% endif %}>{{ row.default }}</td>
<td>{{ row.meaning | coded }}</td></tr>
{%- endfor %}
</tbody></table></div>
{% endmacro %}

{% macro answered(rows) %}
<div class="scroll"><table>
<thead><tr><th>Field</th><th>Value</th><th>Meaning</th></tr></thead><tbody>
{%- for row in rows %}
<tr>{{ name(row, false) }}
<td>{{ row.value }}{% if row.nullable %} or null{% endif %}</td>
<td>{{ row.meaning | coded }}
{%- if not row.required %} <span class="quiet">Not always there.</span>{% endif %}</td></tr>
{%- endfor %}
</tbody></table></div>
{% endmacro %}
"""
