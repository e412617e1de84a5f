"""Servables: writing, checking and calling SavedModels for TF Serving.

This file imports nothing: ``export.verify`` must run without ``clsd_tf``, as a server does.
"""
