"""Serving: store (adapters by name), engine (rows computed together), api (the OpenAI shape), http (the server)."""
