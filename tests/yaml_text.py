"""Settings as the text of a YAML file, for tests that write one."""

from io import StringIO

from ruamel.yaml import YAML


def yaml_text(raw: dict) -> str:
    """Return a mapping as YAML in block style, keys in their order."""
    yaml = YAML(typ="rt", pure=True)
    yaml.default_flow_style = False
    out = StringIO()
    yaml.dump(raw, out)
    return out.getvalue()
