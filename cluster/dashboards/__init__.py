"""Grafana's dashboards, as JSON to provision: ``run.json``, ``fleet.json``, ``data.json``.

They are built by ``python -m cluster.dashboards``, which needs the development dependencies.
"""
