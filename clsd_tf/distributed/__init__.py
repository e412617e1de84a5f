"""Strategies of several devices and processes, and sums over their replicas."""
