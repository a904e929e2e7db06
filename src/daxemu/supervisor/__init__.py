"""One emulated machine: it wires the device, the filesystem, the mount and the tracer together, and serves
the control socket.

``machine``   the wiring, and the verbs of the control socket
``failures``  what happens between a memory failure and its outcome: collect, revoke, signal
``scrub``     the background scrub; ``settings`` what can be set, and to what
``log_handler`` its own messages
``event_log`` the record of it all, and those who follow it
``control``   the socket that carries its requests and replies (``daxemu.protocol``); ``selection`` what a
              follower is sent
``run``       the life of the process: start, serve, end
"""
