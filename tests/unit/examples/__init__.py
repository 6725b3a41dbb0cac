"""The examples do what their first lines say."""
