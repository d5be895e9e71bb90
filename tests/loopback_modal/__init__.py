"""A stand-in for Modal's control plane on this machine: what the real client and the real container
entrypoint talk to.

It answers the public gRPC service of the installed `modal` package and starts containers as
processes. It hides what Modal hides (uncommitted writes, other containers' commits until a reload),
refuses what Modal refuses, and preempts on demand. Nothing here is imported by the pipeline.
"""
