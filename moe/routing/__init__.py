"""Routers, balance losses, capacity and dropping: pure maths first."""
