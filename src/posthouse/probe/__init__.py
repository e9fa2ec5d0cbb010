"""Probes: mail clients as strangers and users have them, and the book that proves that nothing was lost."""
