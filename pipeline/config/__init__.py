"""Settings: sections with defaults and rules, from YAML files and overrides; knows no family."""
