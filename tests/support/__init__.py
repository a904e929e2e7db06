"""Code that several tests share: drivers of real processes, and the like. No tests of daxemu here."""
