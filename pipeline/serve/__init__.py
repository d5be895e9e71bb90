"""A bundle behind an HTTP endpoint: engine runs it, app speaks OpenAI's protocol; the same here and
on Modal."""
