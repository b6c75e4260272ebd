"""The claims of bench/claims.toml: how a part is decided, what the probes measure, and the page that is written."""
