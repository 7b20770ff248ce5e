"""Serving compressed models on Ray Serve behind an OpenAI-compatible endpoint.

Begin with `fleet`: models are resolved, each becomes a Serve application (`deployments`), the gateway is told where they
are. `endpoint` is the fleet of `shoal serve`, `app` that of a RayService. From a socket to a token: `http` (the door, the
protocol) → `replica` (a variant and its weights) → `engine` (who makes tokens). Beside the way: `sources` reads what to
serve, `observer` notes what routes and shadows show, `bench` measures under the loads of `load`.
`settings` are values that all may import; this room may import its three, `tracking`, `cluster` and the ground.
"""
