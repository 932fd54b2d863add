// Puts the parts on the page.

const wanted = cellOf(location.hash.slice(1));
applyTheme();
drawHead();
drawHeadline();
if (report.maps.length) drawMaps();
if (report.cards) drawCards();
report.tables.forEach(drawTable);
main.append(el("footer", {}, "Made by Quorate. This page carries its data and loads nothing. "
  + "In a map the arrow keys move and Enter chooses an expert."));
if (wanted) choose(wanted, true);
else if (report.cards?.cards.length) choose(cellOfCard(report.cards.cards[0]));
