"""Serving: store (adapters by name), engine (rows that decode together), api (the OpenAI shape), http (the server)."""
