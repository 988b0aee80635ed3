"""A local page to edit videos in: `kvlock app`.

What the page does is plain functions over arrays and files, which know nothing of the page: `clips`
reads what is uploaded, `marks` makes a mask of what is marked, `views` draws it, `request` checks
the fields and tells the command that does the same, `curves` draws a run, `edits` runs one and
`jobs` runs them one at a time. `page` puts them on a page, by Gradio.
"""
