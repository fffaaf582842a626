"""What people read of results: tables, sentences, pictures, and the pages that hold them."""
