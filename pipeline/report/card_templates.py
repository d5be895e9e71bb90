"""What model cards consist of, as jinja2 templates of Markdown.

Each has one block of Python that is whole: typed in the folder it loads the model, asks it and
prints its text. The tests run it as it stands.

In Markdown a paragraph may run over several lines, but a row of a table may not: rows are made by
functions of card.py. {{ }} escapes for Markdown here, not for HTML.
"""

TRANSFORMERS_EXAMPLE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
prompt = tokenizer("Once upon a time", return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```
"""

GGUF_EXAMPLE = """\
```python
import xllamacpp  # llama.cpp in a package: pip install xllamacpp

settings = xllamacpp.CommonParams()
settings.model.path = "{{ about.file }}"
settings.n_ctx = {{ about.context_tokens }}
settings.n_parallel = 1
server = xllamacpp.Server(settings)
prompt = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
print(server.handle_completions(prompt)["choices"][0]["text"])
```

`llama-cli -m {{ about.file }}`, Ollama and LM Studio load the same file.
"""

ADAPTERS_EXAMPLE = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({{ use.pretrained }})
base = AutoModelForCausalLM.from_pretrained({{ use.pretrained }}, dtype="auto")
model = PeftModel.from_pretrained(base, "{{ use.adapter }}")
prompt = tokenizer("Once upon a time", return_tensors="pt")
ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```
"""

REQUESTS_EXAMPLE = """\
```python
from peft import PeftModel
from transformers import AutoTokenizer, {{ use.architecture }}

tokenizer = AutoTokenizer.from_pretrained("{{ use.tokenizer }}")
base = {{ use.architecture }}.from_pretrained({{ use.pretrained }}, dtype="auto")
model = PeftModel.from_pretrained(base, "{{ use.adapter }}")
chat = [{"role": "user", "content": "What is it?"}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)
answer = ids[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```
"""

DRAWN_TABLE = """\
### {{ drawn.title }}

{{ table_head(drawn) }}
{% for row in drawn.rows %}
{{ table_line(row) }}
{% endfor %}

{{ drawn.reading }}

"""

EXPORT_CARD = """\
---
{{ front }}
---

# {{ about.run }}

{{ about.what }}

| part | trained as |
| --- | --- |
{% for name, address in about.parts.items() %}
{{ line([name, code(address)]) }}
{% endfor %}

## Use

{% include about.example %}

```
sha256sum --check --quiet SHA256SUMS       # every file is what was exported
```

{% for drawn in tables if drawn.rows %}
## How good it is

What this is, is the row {{ about.row }}.

{% include "drawn_table.md" %}
{% endfor %}
## To know

{% for note in about.notes %}
- {{ note }}
{% endfor %}
- A base model: it goes on with a text and was not taught to follow instructions or to refuse any.
"""

LANGUAGE_CARD = """\
{% extends "card.md" %}
{% block body %}
A mixture of {{ about.experts|length }} experts, {{ about.top_k }} of them active per token, trained
in parts with MoleForge: a shared trunk, experts that never met while they trained, and a router
that joins them. It is an ordinary `{{ about.architecture }}` with {{ total }} parameters,
{{ active }} of them active per token, in fp32. {{ size }}

## Experts

| number | expert | domain | trained as | file |
| ---: | --- | --- | --- | --- |
{% for each in about.experts %}
{% set whole = "all (the dummy of the trunk's training, kept)" %}
{% set domain = each.label|default(each.domain) or whole %}
{{ line([loop.index0, each.name, domain, code(each.address), code(each.file)]) }}
{% endfor %}

Trunk `{{ about.trunk.address }}`, router `{{ about.router.address }}`.
{% if about.dense is defined %}

Beside the stack, in `dense/`, stands the run's dense baseline {{ about.dense.name }}
({{ code(about.dense.address) }}), a checkpoint by itself; below it is the row
dense {{ about.dense.name }}.
{% endif %}

## Use

{% include "transformers_example.md" %}

```
sha256sum --check --quiet SHA256SUMS       # every file is what was bundled
python -m pipeline serve --bundle .        # /v1/completions; /v1/route: which expert took what
```

{% if about.start_ids %}
The tokenizer puts token {{ about.start_ids|join(", ") }} in front of a text, as every text had it
while the model trained; so does the server above.
{% else %}
The tokenizer puts nothing in front of a text, as that of the pretrained trunk; nor does the server
above.
{% endif %}
Texts were cut at {{ about.context_tokens }} tokens at most.

## How good it is

On held-out text; report.html has it in full. A win holds on the axis it names.
{% endblock %}
{% block notes %}
- A base model: it goes on with a text and was not taught to follow instructions or to refuse any.
- What it has not seen in {{ names }} it does not know.
{% endblock %}
"""

TEXT_ADAPTERS_CARD = """\
{% extends "card.md" %}
{% block body %}
{{ about.experts|length }} experts, each a LoRA adapter on all linear layers of one
`{{ about.architecture }}`, which is in this folder, and a router that chooses one of them, or none,
for a whole text by its first {{ about.prompt_tokens }} tokens. Made with MoleForge. The adapters
never met while they trained.

## Experts

| expert | domain | trained as | folder |
| --- | --- | --- | --- |
{% for each in about.experts %}
{{ line([each.name, each.label|default(each.domain), code(each.address), code(each.folder)]) }}
{% endfor %}

Base `{{ about.trunk.address }}`, router `{{ about.router.address }}` in
`{{ about.router.folder }}`.
{{ total }} parameters, of which {{ active }} run per token. {{ size }}

## Use

One expert, in stock tools:

{% include "adapters_example.md" %}

All of them, each text with its own:

```
sha256sum --check --quiet SHA256SUMS       # every file is what was bundled
python -m pipeline serve --bundle .        # /v1/completions; /v1/route: who reads a text
```

## How good it is

On held-out text; report.html has it in full. A win holds on the axis it names.
{% endblock %}
{% block notes %}
- A base model: it goes on with a text and was not taught to follow instructions or to refuse any.
{% endblock %}
"""

REQUEST_CARD = """\
{% extends "card.md" %}
{% block body %}
{{ about.experts|length }} experts, each a LoRA adapter for one task on the frozen {{ kind }}
{{ about.base.model }} ({{ origin }}), and a router that is one more adapter: it answers a request
with an expert's label, a single token. Made with MoleForge. The adapters never met while they
trained.

## Experts

| expert | label | task | what it does | judged by | trained as | folder |
| --- | --- | --- | --- | --- | --- | --- |
{% for each in about.experts %}
{{ line([each.name, each.label, each.task, each.description, each.metric, code(each.address),
         code(each.folder)]) }}
{% endfor %}

Router `{{ about.router.address }}` in `{{ about.router.folder }}`; its temperature is in
calibration.json there. Below a confidence of {{ "%g"|format(about.policy.threshold) }} the
likeliest {{ about.policy.top_k }} experts answer and the best answer is taken; a request that is
nobody's goes to {{ about.policy.fallback }}. Weights are never averaged.

## Use

{% include "requests_example.md" %}

```
sha256sum --check --quiet SHA256SUMS       # every file is what was bundled
python -m pipeline serve --bundle .        # /v1/chat/completions; /v1/route: which expert it takes
```

{% if about.base.image is defined %}
Pictures were trained on with {{ "{:,}".format(about.base.image.min_pixels) }} to
{{ "{:,}".format(about.base.image.max_pixels) }} px; keep them so.

{% endif %}
## How good it is

On held-out requests; report.html has it in full.
{% endblock %}
"""

CARD = """\
---
{{ front }}
---

# {{ about.run }}

{% block body %}{% endblock %}

{% for drawn in tables if drawn.rows %}
{% include "drawn_table.md" %}
{% endfor %}
## To know

{% for note in report.notes %}
- {{ note }}
{% endfor %}
{% block notes %}{% endblock %}
"""

CARDS = {
    "card.md": CARD,
    "language_card.md": LANGUAGE_CARD,
    "text_adapters_card.md": TEXT_ADAPTERS_CARD,
    "request_card.md": REQUEST_CARD,
    "export_card.md": EXPORT_CARD,
    "drawn_table.md": DRAWN_TABLE,
    "transformers_example.md": TRANSFORMERS_EXAMPLE,
    "gguf_example.md": GGUF_EXAMPLE,
    "adapters_example.md": ADAPTERS_EXAMPLE,
    "requests_example.md": REQUESTS_EXAMPLE,
}
