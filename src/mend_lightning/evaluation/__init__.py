"""What an edit did to questions, and whether it is safe to keep."""
