"""Settings: sections with defaults and rules, read from YAML files and overrides; knows no family."""
