"""The HTTP server: OpenAI's and Anthropic's APIs over the engine, accounts, metrics, and a playground."""
