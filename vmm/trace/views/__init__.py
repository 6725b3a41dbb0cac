"""What a trace looks like: tables, a page, pictures, and a file for Perfetto."""
