"""What came out: metrics, statistics, tables, figures."""
