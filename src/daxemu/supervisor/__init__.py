"""One emulated machine: device, filesystem, mount and tracer, constructed and served by one process.

``run``          life of the process: start, serve, end; ``spawn`` starts the process in the background
``machine``      construction of all parts, and the table of verbs; ``core`` memory failures and filesystem
``verbs``        requests of the control socket, one module a group
``failures``     from a memory failure to its outcome: collect, revoke, repair, signal; ``signals`` SIGBUS
``latent``       processes to signal once latent poison is discovered
``consumption``  loads, stores and reads of poison
``clones``       blocks shared between files
``incidents``    pages to collect or revoke without a failure
``repairs``      from a failure to a verdict; ``strategy_host`` and ``guard`` calls into the strategy
``scrub``        background scrub; ``reclaim`` background release of blocks
``control``      control socket; ``descriptors`` limits of peers; ``selection`` filter of events
``event_log``    events in memory and their followers; ``event_file`` DEVICE/events.jsonl
``log_handler``  messages of the supervisor; ``supervisor_log`` rotation of DEVICE/supervisor.log
``settings``     values of settings and mount options
``under_way``    failures and signals that ``settle`` waits for; ``internals`` what waits at a moment
"""
