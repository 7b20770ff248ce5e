"""From a socket to a call of a variant, and its pieces back as OpenAI's shapes.

In the order of a request: `server` (listens), `wire` (a connection), `door` with `keys` (its head), `web` (its path),
`protocol` (its body), `gateway` with `routes` (its variant), `stream` (its calls), `writers` and `sse` (its answer).
`refusals` and `failures` word what goes wrong, `health` says who can answer, `record` and `experiments` note what came of
it. May import `replica.channel` and `engine.generation`, the values of a request.
"""
