"""Serving compressed models on Ray Serve behind an OpenAI-compatible endpoint.

Begin with `deploy`: models are resolved, each becomes a Serve application, a gateway is told where they are. From a socket
to a token: `http` (the door, the protocol) → `replica` (a variant and its weights) → `engine` (who makes tokens).
`settings` are values that all may import; this room may import its three, `tracking`, `cluster` and the ground.
"""
