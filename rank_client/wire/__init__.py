"""What both sides share: records, segments, frames, the client's session.

Nothing here opens a socket, reads a clock or draws a random number: time, randomness and storage
are passed in, so that a real shell, a simulator and a fuzzer drive the same code. The gateway
imports this package and nothing else of `rank_client`.
"""
