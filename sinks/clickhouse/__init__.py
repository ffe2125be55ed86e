"""The store: ClickHouse or chDB through clickhouse-connect, and its read-only HTTP face."""
