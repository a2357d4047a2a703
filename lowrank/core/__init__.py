"""Chains of stages: geometry, algebra, cost and a reference implementation."""
