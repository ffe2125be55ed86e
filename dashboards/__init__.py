"""Dashboards: panels defined once, rendered for Grafana and as a built-in HTML view."""
