"""From a socket to a call of a variant, and its pieces back as OpenAI's shapes.

In the order of a request: `wire`, `door`, `web`, `protocol`, `gateway`, `stream`, `writers`, `sse`; `server` holds them
together. May import `replica` and `engine.generation`, the values of a request.
"""
