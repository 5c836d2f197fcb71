"""The server: OpenAI's API over HTTP, for one engine and several concurrent clients."""
