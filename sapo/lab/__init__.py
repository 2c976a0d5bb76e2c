"""Worlds small enough to be exact, and the ledger of claims."""
