"""Tests of other mounts that must hold on a direct mount unchanged."""

from __future__ import annotations

from tests.mount.test_latent import *  # noqa: F403

del test_a_second_latent_injection_forgets_no_process  # noqa: F821 - counts on fault-around
