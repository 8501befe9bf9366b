"""Adapters, one for each array library, found by ``aqt_lite._registry``; ``cpu`` is what three of them share."""
