"""Adapters: one file for each array library, found by ``aqt_lite._registry``."""
