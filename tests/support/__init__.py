"""Code shared by several tests: drivers of real processes, and the like. No tests of daxemu here."""
